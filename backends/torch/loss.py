"""Training losses of DSpark: cross entropy, total variation and confidence, weighted by position in the block.

Every loss is sum(weight * value) / (sum(weight) + 1e-6) over all drafts of a batch. Shapes: N = documents, A = anchors,
B = drafts a block, W = draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6


@dataclass(frozen=True)
class LossSettings:
    """Shares of the three losses; the weight of position i in a block is exp(-i / decay), i from 0; None = flat."""

    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    decay: float | None = 4.0


@dataclass(frozen=True)
class Term:
    """A weighted mean, kept as its two sums so that batches can be added up."""

    numerator: Tensor
    denominator: Tensor

    @property
    def value(self) -> Tensor:
        return self.numerator / (self.denominator + EPSILON)


@dataclass(frozen=True)
class Losses:
    """The losses of one batch.

    accept_rate: [N, A, B]  1 - TV(target, draft): the chance that a sampled draft is accepted; 0 where nothing counts
    weights:     [N, A, B]
    """

    ce: Term
    l1: Term
    confidence: Term | None
    total: Tensor
    accept_rate: Tensor
    weights: Tensor


def position_weights(valid: Tensor, decay: float | None) -> Tensor:
    """float [N, A, B]: valid (bool [N, A, B]) * exp(-i / decay)."""
    weights = valid.float()
    if decay is None:
        return weights
    steps = torch.arange(valid.shape[-1], dtype=torch.float32, device=valid.device)
    return weights * torch.exp(-steps / decay)


def on_draft_vocabulary(target_probs: Tensor, target_ids: Tensor, d2t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a reduced drafter is trained on: (probs [..., W], outside [...], draft ids [...], -1 = not among them).

    target_probs [..., V], target_ids [...]; d2t int64 [W].
    """
    t2d = torch.full((target_probs.shape[-1],), -1, dtype=torch.int64, device=d2t.device)
    t2d[d2t] = torch.arange(len(d2t), device=d2t.device)
    probs = target_probs[..., d2t]
    return probs, (1 - probs.sum(dim=-1)).clamp(min=0), t2d[target_ids]


def drafter_losses(
    logits: Tensor,
    confidence: Tensor | None,
    target_probs: Tensor,
    target_ids: Tensor,
    valid: Tensor,
    settings: LossSettings,
    *,
    outside: Tensor | None = None,
) -> Losses:
    """Losses of logits [N, A, B, W] and confidence logits [N, A, B] against the target's distribution.

    target_probs: [N, A, B, W]  the target's probability of each draft-vocabulary token
    target_ids:   int64 [N, A, B]  labels as draft-vocabulary ids; -1 = not in the draft vocabulary (no cross entropy)
    outside:      [N, A, B]  target probability outside a reduced draft vocabulary
    """
    weights = position_weights(valid, settings.decay)
    known = target_ids >= 0
    log_probs = logits.float().log_softmax(dim=-1)
    picked = log_probs.gather(-1, target_ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ce = _term(-picked, weights * known)
    distance = (log_probs.exp() - target_probs).abs().sum(dim=-1)
    if outside is not None:
        distance = distance + outside
    l1 = _term(distance, weights)
    accept_rate = (1 - 0.5 * distance).clamp(0, 1).detach() * valid
    total = settings.ce * ce.value + settings.l1 * l1.value
    sure = None
    if confidence is not None:
        sure = _term(F.binary_cross_entropy_with_logits(confidence.float(), accept_rate, reduction="none"), weights)
        total = total + settings.confidence * sure.value
    return Losses(ce, l1, sure, total, accept_rate, weights)


def _term(values: Tensor, weights: Tensor) -> Term:
    return Term((values * weights).sum(), weights.sum())


@dataclass(frozen=True)
class Metrics:
    """What a batch says about the drafter, over the drafts that count. The confidence figures use the loss weights.

    accept_rate_by_position: [B]  mean acceptance of each position
    tau:                     expected tokens a round: 1 + mean over blocks of the summed running product of accept rates
    confidence_abs_error:    mean |confidence - accept rate|
    confidence_bias:         mean (confidence - accept rate)
    confidence_cumprod_bias: the same for the running products along the block
    """

    accept_rate_by_position: Tensor
    tau: Tensor
    confidence_abs_error: Tensor | None
    confidence_bias: Tensor | None
    confidence_cumprod_bias: Tensor | None


@torch.no_grad()
def drafter_metrics(losses: Losses, confidence: Tensor | None) -> Metrics:
    """Metrics of a batch from its losses and its confidence logits [N, A, B]."""
    rate, weights = losses.accept_rate, losses.weights
    counted = (weights > 0).float()
    by_position = (rate * counted).sum(dim=(0, 1)) / (counted.sum(dim=(0, 1)) + EPSILON)
    survival = (rate * counted).cumprod(dim=-1)
    tau = 1 + survival.sum() / (counted[..., 0].sum() + EPSILON)
    if confidence is None:
        return Metrics(by_position, tau, None, None, None)
    sure = torch.sigmoid(confidence.float())
    predicted = (sure * counted).cumprod(dim=-1)
    gaps = ((sure - rate).abs(), sure - rate, predicted - survival)
    return Metrics(by_position, tau, *(_term(gap, weights).value for gap in gaps))
