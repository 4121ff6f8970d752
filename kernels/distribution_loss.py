"""How far a drafter's distribution is from the target's, row by row, with the gradient made on the way.

Written with autograd this is some twenty passes over rows of the draft vocabulary, forward and backward, and each pass
goes through memory. Here a few rows at a time go through all of them while they are in the cache. n = rows,
S = positions of the text, W = draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20  # of float32 rows that are worked on at once: a few of such buffers fit the cache of one core


def reference(
    logits: Tensor, target_probs: Tensor, judges: Tensor, outside: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """As written in the paper, by autograd: see `distribution_loss`."""
    log_probs = logits.float().log_softmax(dim=-1)
    wanted = target_probs[judges]
    kl = -(wanted * log_probs).sum(dim=-1)
    l1 = (log_probs.exp() - wanted).abs().sum(dim=-1) + outside[judges]
    return (shares[:, 0] * kl + shares[:, 1] * l1).sum(), l1.detach()


def distribution_loss(
    logits: Tensor, target_probs: Tensor, judges: Tensor, outside: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """(weighted loss, l1 [n]) of logits [n, W] against the target's probabilities.

    target_probs [S, W] and outside [S] (probability of tokens the drafter cannot propose); judges int64 [n]: the row of
    them that judges each row; shares [n, 2]: weight of cross entropy against the distribution, and of l1 = sum|q - p|.
    The gradient flows to `logits` only; l1 has none.
    """
    if logits.device.type != "cpu":
        return reference(logits, target_probs, judges, outside, shares)
    loss, l1 = _Chunked.apply(logits, target_probs, judges, outside, shares)
    return loss, l1


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target_probs: Tensor, judges: Tensor, outside: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        step = max(1, CHUNK_BYTES // (4 * width))
        gradient = torch.empty_like(logits)
        l1, total = torch.empty(rows), torch.zeros(())
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            log_probs = logits[part].float().log_softmax(dim=-1)
            probs, wanted = log_probs.exp(), target_probs[judges[part]]
            kl = -(wanted * log_probs).sum(dim=-1)
            gap = probs - wanted
            l1[part] = gap.abs().sum(dim=-1) + outside[judges[part]]
            by_kl, by_l1 = shares[part, :1], shares[part, 1:]
            total += (by_kl[:, 0] * kl + by_l1[:, 0] * l1[part]).sum()
            sign = gap.sign_()
            pull = (probs * sign).sum(dim=-1, keepdim=True)
            mass = wanted.sum(dim=-1, keepdim=True)
            # d kl = probs * mass - wanted;  d l1 = probs * (sign - <probs, sign>)
            gradient[part] = probs.mul_(sign.sub_(pull).mul_(by_l1).add_(by_kl * mass)).sub_(wanted.mul_(by_kl))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(l1)
        return total, l1

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None, None
