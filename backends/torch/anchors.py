"""Many anchors of one document in one pass: positions, labels, and attention with shared context keys.

Shapes: N = documents, S = their length, A = anchors a document, R = rows of a block, B = drafts a block,
H / K = query / KV heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_cli.backends.torch.layers import Attend


@dataclass(frozen=True)
class TrainingOutput:
    """What a `training_forward` gives for A blocks of N documents.

    logits:     [N, A, B, W]  teacher forced, with the sequential head's bias if there is one
    confidence: [N, A, B]     logits; None without a confidence head
    hidden:     [N, A, B, d]  DSpark: after the final norm; Eagle3: before it
    """

    logits: Tensor
    confidence: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class Labels:
    """What the drafts of A blocks are judged by.

    indices: int64 [N, A, B]  position of each label in the document (clamped; 0 in dummy blocks)
    ids:     int64 [N, A, B]  the tokens there
    valid:   bool  [N, A, B]  counted in the loss: one disabled label disables the rest of its block
    """

    indices: Tensor
    ids: Tensor
    valid: Tensor


def block_positions(anchor_positions: Tensor, rows: int) -> Tensor:
    """Positions int64 [N, A, R] of the rows of every block: the anchor's own, then the following ones."""
    return anchor_positions.unsqueeze(-1) + torch.arange(rows, device=anchor_positions.device)


def make_labels(input_ids: Tensor, loss_mask: Tensor, anchor_positions: Tensor, keep: Tensor, block: int) -> Labels:
    """Labels of blocks at `anchor_positions` [N, A] (keep: bool [N, A]) in documents input_ids, loss_mask [N, S]."""
    length = input_ids.shape[1]
    wanted = block_positions(anchor_positions, block) + 1
    indices = torch.where(keep.unsqueeze(-1), wanted.clamp(max=length - 1), 0)
    enabled = gather_rows(loss_mask, indices) > 0.5
    valid = keep.unsqueeze(-1) & (wanted < length) & enabled
    return Labels(indices, gather_rows(input_ids, indices), valid.cumprod(dim=-1).bool())


def gather_rows(values: Tensor, indices: Tensor) -> Tensor:
    """values [N, S, ...] at indices [N, A, B] -> [N, A, B, ...]."""
    batch = torch.arange(len(values), device=values.device).view(-1, 1, 1)
    return values[batch, indices]


def previous_tokens(input_ids: Tensor, anchor_positions: Tensor, keep: Tensor, block: int) -> Tensor:
    """int64 [N, A, B]: the token before each draft: the anchor, then the labels but the last (teacher forcing)."""
    indices = block_positions(anchor_positions, block).clamp(max=input_ids.shape[1] - 1)
    return gather_rows(input_ids, torch.where(keep.unsqueeze(-1), indices, 0))


def sample_anchors(loss_mask: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Up to `count` anchors a document, sorted: (positions int64 [N, count], keep bool [N, count]).

    An anchor needs the loss at its own place and at the next; dummies stand at position 0 with keep False.
    """
    able = (loss_mask[:, :-1] > 0.5) & (loss_mask[:, 1:] > 0.5)
    order = torch.rand(able.shape, generator=generator, device=able.device).masked_fill(~able, 2.0)
    taken = min(count, able.shape[1])
    picked = order.topk(taken, dim=1, largest=False).indices
    last = able.shape[1]  # sorts after every real anchor
    picked = torch.where(able.gather(1, picked), picked, last).sort(dim=1).values
    picked = torch.nn.functional.pad(picked, (0, count - taken), value=last)
    keep = picked < last
    return torch.where(keep, picked, 0), keep


def training_attends(
    context: Sequence[tuple[Tensor, Tensor]],
    positions: Tensor,
    scale: float,
    windows: Sequence[int | None],
    *,
    causal: bool,
) -> list[Attend]:
    """One `Attend` a layer: block rows [N, A*R] at `positions` [N, A, R] over `context` keys, values [N, S, K, D]."""
    masks: dict[int | None, tuple[Tensor, Tensor]] = {}
    attends = []
    for (keys, values), window in zip(context, windows, strict=True):
        if window not in masks:
            masks[window] = _masks(positions, keys.shape[1], window, causal)
        attends.append(_shared_context_attend(keys, values, positions.shape[1:], scale, masks[window]))
    return attends


def _masks(positions: Tensor, length: int, window: int | None, causal: bool) -> tuple[Tensor, Tensor]:
    """(context mask bool [N, A, R or 1, S], own-block mask bool [R, R]); True = visible."""
    rows = positions.shape[-1]
    keys = torch.arange(length, device=positions.device)
    context = keys < positions[..., :1, None]  # strictly before the anchor
    step = torch.arange(rows, device=positions.device)
    ahead = step - step.unsqueeze(1)  # key row - query row
    if window is None:
        return context, torch.ones_like(ahead, dtype=torch.bool)
    context = context & (positions.unsqueeze(-1) - keys < window)
    return context, (ahead.abs() < window) & ((ahead <= 0) | (not causal))


def _shared_context_attend(
    context_keys: Tensor, context_values: Tensor, blocks: Sequence[int], scale: float, masks: tuple[Tensor, Tensor]
) -> Attend:
    """Each block attends to the context and to itself only, so scores are [.., S + R] wide and not [.., S + A*R]."""
    anchors, rows = blocks
    context_mask, own_mask = masks

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n, _, heads, dim = queries.shape
        kv_heads = keys.shape[2]
        group = heads // kv_heads
        q = queries.view(n, anchors, rows, kv_heads, group, dim).permute(0, 3, 1, 4, 2, 5)  # N K A g R D
        own_k, own_v = (
            x.view(n, anchors, rows, kv_heads, dim).permute(0, 3, 1, 2, 4) for x in (keys, values)
        )  # N K A R D
        ctx_k, ctx_v = (x.transpose(1, 2) for x in (context_keys, context_values))  # N K S D
        q = q * scale
        flat = q.reshape(n, kv_heads, anchors * group * rows, dim)
        context = (flat @ ctx_k.mT).view(n, kv_heads, anchors, group, rows, -1)
        context = context.masked_fill(~context_mask[:, None, :, None], float("-inf"))
        own = q.reshape(n, kv_heads, anchors, group * rows, dim) @ own_k.mT
        own = own.view(n, kv_heads, anchors, group, rows, rows).masked_fill(~own_mask, float("-inf"))
        weights = torch.cat([context, own], dim=-1).softmax(dim=-1)
        on_context, on_own = weights.split([ctx_k.shape[2], rows], dim=-1)
        out = (on_context.reshape(n, kv_heads, anchors * group * rows, -1) @ ctx_v).view_as(q)
        out = out + (on_own.reshape(n, kv_heads, anchors, group * rows, rows) @ own_v).view_as(q)
        return out.permute(0, 2, 4, 1, 3, 5).reshape(n, anchors * rows, heads * dim)

    return attend


class ChainAttend:
    """Eagle3's attention in training: step k of each of A chains sees the pairs before the chain and its own steps 0..k.

    keys, values [N, S, K, D] of the true pairs; first int64 [N, A]: the pair at which each chain begins.
    """

    def __init__(self, keys: Tensor, values: Tensor, first: Tensor, scale: float) -> None:
        self._keys, self._values, self._scale = keys, values, scale
        self._mask = torch.arange(keys.shape[1], device=keys.device) < first.unsqueeze(-1)  # [N, A, S]
        self._own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One step: queries [N, A, H, D], keys and values [N, A, K, D] -> [N, A, H*D]."""
        self._own.append((keys, values))
        own_keys, own_values = (torch.stack(parts, dim=2) for parts in zip(*self._own, strict=True))  # N A k K D
        grouped = queries.unflatten(2, (keys.shape[2], -1)) * self._scale  # N A K g D
        context = torch.einsum("nakgd,nskd->nakgs", grouped, self._keys)
        context = context.masked_fill(~self._mask[:, :, None, None], float("-inf"))
        own = torch.einsum("nakgd,nackd->nakgc", grouped, own_keys)
        weights = torch.cat([context, own], dim=-1).softmax(dim=-1).to(own_values.dtype)
        on_context, on_own = weights.split([context.shape[-1], own.shape[-1]], dim=-1)
        out = torch.einsum("nakgs,nskd->nakgd", on_context, self._values)
        out = out + torch.einsum("nakgc,nackd->nakgd", on_own, own_values)
        return out.flatten(2)
