"""Judging drafts: accept probabilities, the first rejection, and the token that ends the round, for all sequences at once.

    accept draft x at row i when uniform[i] < min(1, target_probs[i, x] / max(draft_probs[i, x], 1e-8))
    at the first rejection draw from norm(max(target_probs - draft_probs, 0)), or from target_probs where nothing is left of it
    with everything accepted draw from the row after the last draft

(Leviathan et al. 2023; tests/golden/NOTES.md 14-15 for the corner cases.) All random numbers are given, so that results are
reproducible. A draft without probabilities is deterministic: all its mass is on its token. A temperature below GREEDY means
one-hot target probabilities, so that acceptance is equality with the best token.

Shapes: N = sequences, k = drafts of the longest block, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark_cli.kernels.dispatch import path_for
from dspark_cli.kernels.draws import draw
from dspark_cli.kernels.markov_step import GREEDY

#: below this a probability, or what is left of a distribution, counts as none
TINY = 1e-8


def verify_draft(
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    draft_probs: Tensor | None,
    temperature: Tensor,
    uniform: Tensor,
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Accepted drafts int64 [N] (0 to lengths) and the token after them int64 [N].

    logits:      [N, k+1, V]  of the target; row i judges draft i, row lengths[n] gives the bonus token
    tokens:      int64 [N, k]  drafts; lengths: int64 [N], how many of them count
    draft_probs: float32 [N, k, V]  what each draft was drawn from; None for deterministic drafts
    temperature: float32 [N] of the target's distribution
    uniform:     float32 [N, k+1] in [0, 1): the first k decide on the drafts, the last draws the token
    """
    if path_for(path, on_gpu=logits.is_cuda) == "reference":
        return reference(logits, tokens, lengths, draft_probs, temperature, uniform)
    return _triton(logits, tokens, lengths, draft_probs, temperature, uniform)


def reference(
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    draft_probs: Tensor | None,
    temperature: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """`verify_draft` in torch."""
    n, k = tokens.shape
    target_probs = probabilities(logits, temperature)
    if draft_probs is None:
        draft_probs = torch.zeros_like(target_probs[:, :k]).scatter_(2, tokens.unsqueeze(-1), 1.0)
    accepted = _accepted(target_probs, tokens, lengths, draft_probs, uniform)
    last = target_probs[torch.arange(n), accepted]
    if k:
        row = accepted.clamp(max=k - 1)
        rest = (last - draft_probs[torch.arange(n), row]).clamp(min=0.0)
        use_rest = (accepted < lengths) & (rest.sum(dim=-1) > TINY)
        last = torch.where(use_rest.unsqueeze(1), rest, last)
    return accepted, draw(last, uniform[:, k])


def probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """float32 [N, R, V] of logits [N, R, V] at temperature [N]; one-hot at the lowest best token below GREEDY."""
    logits = logits.float()
    soft = (logits / temperature.clamp(min=GREEDY).view(-1, 1, 1)).softmax(dim=-1)
    sharp = torch.zeros_like(soft).scatter_(2, logits.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where((temperature < GREEDY).view(-1, 1, 1), sharp, soft)


def _accepted(target_probs: Tensor, tokens: Tensor, lengths: Tensor, draft_probs: Tensor, uniform: Tensor) -> Tensor:
    """int64 [N]: drafts before the first that is refused."""
    k = tokens.shape[1]
    at = tokens.unsqueeze(-1)
    mine, theirs = target_probs[:, :k].gather(2, at).squeeze(2), draft_probs.gather(2, at).squeeze(2)
    kept = uniform[:, :k] < (mine / theirs.clamp(min=TINY)).clamp(max=1.0)
    counts = torch.arange(k, device=tokens.device) < lengths.unsqueeze(1)
    return (kept & counts).long().cumprod(dim=1).sum(dim=1)


def _triton(
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    draft_probs: Tensor | None,
    temperature: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    from dspark_cli.kernels import verify_draft_triton as kernels

    n, rows, width = logits.shape
    block = min(kernels.BLOCK, _power(width))
    blocks = -(-width // block)
    floats = {"dtype": torch.float32, "device": logits.device}
    peaks, masses = torch.empty(n, rows, blocks, **floats), torch.empty(n, rows, blocks, **floats)
    places = torch.empty(n, rows, blocks, dtype=torch.int64, device=logits.device)
    peak, mass = torch.empty(n, rows, **floats), torch.empty(n, rows, **floats)
    accepted, bonus = (torch.empty(n, dtype=torch.int64, device=logits.device) for _ in range(2))
    rest = torch.empty(n, blocks, **floats)
    logits, tokens, lengths = logits.contiguous(), tokens.contiguous(), lengths.contiguous()
    temperature, uniform = temperature.float().contiguous(), uniform.float().contiguous()
    probs = logits if draft_probs is None else draft_probs.contiguous()
    has: dict[str, Any] = {"SAMPLED": draft_probs is not None, "GREEDY": GREEDY, "TINY": TINY}
    chunk = min(1024, _power(blocks))
    kernels.summarize[(blocks, rows, n)](
        logits, temperature, peaks, places, masses, width, rows, blocks, BLOCK=block, GREEDY=GREEDY
    )
    kernels.judge[(n,)](
        *(logits, probs, tokens, lengths, temperature, uniform, peaks, places, masses, peak, mass, accepted, bonus),
        *(width, rows, blocks),
        CHUNK=chunk,
        **has,
    )
    kernels.leave[(blocks, n)](
        *(logits, probs, tokens, lengths, temperature, peak, mass, accepted, rest, width, rows, blocks),
        BLOCK=block,
        **has,
    )
    kernels.finish[(n,)](
        *(logits, probs, tokens, lengths, temperature, uniform, peaks, masses, peak, mass, accepted, rest, bonus),
        *(width, rows, blocks),
        BLOCK=block,
        CHUNK=chunk,
        **has,
    )
    return accepted, bonus


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
