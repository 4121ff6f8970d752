"""The confidence head, fitted last, on documents the drafter has not learned from.

During training the head sees what the drafter does on text it partly knows by heart, and becomes too sure (docs/training.md).
What it needs to know is how the finished drafter fares on new text; for one linear layer that is a small convex problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dspark_cli.backends.torch.anchors import previous_tokens
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.heads import ConfidenceHead
from dspark_cli.training.corpus import Corpus
from dspark_cli.training.features import Stretch
from dspark_cli.training.trainer import Trainer, judge

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the squared weights of standardised inputs; the best by documents left out
ANCHORS = 96  # of a document
DOCUMENTS = 512  # more change nothing that a linear layer can say, and all rows are fitted at once


@dataclass(frozen=True)
class ConfidenceFit:
    """rows: draft positions;  bce_before, bce_after: mean binary cross entropy on documents left out of the fit; decay."""

    rows: int
    bce_before: float
    bce_after: float
    decay: float


def fit_confidence(
    trainer: Trainer, corpus: Corpus, stretches: Sequence[Stretch], seed: int = 0
) -> ConfidenceFit | None:
    """Fit the head to 1 - TV (the paper's label) on `stretches`, none of them trained on; None with too few of them.

    A quarter of the documents chooses the decay and judges; the head is kept as it was if it does better there.
    """
    model = trainer.model
    if not isinstance(model, DSpark) or model.confidence_head is None or len(stretches) < 8:
        return None
    generator = np.random.default_rng(seed)
    parts = [_rows(trainer, model, corpus, s, generator) for s in stretches[:DOCUMENTS]]
    cut = len(parts) // 4
    judged, fitted = (tuple(torch.cat(x) for x in zip(*p, strict=True)) for p in (parts[:cut], parts[cut:]))
    before = _bce(model.confidence_head, judged[0], judged[1])
    best: tuple[float, float, tuple[Tensor, Tensor]] | None = None
    for decay in DECAYS:
        weights = _logistic(fitted[0], fitted[1], decay)
        after = float(F.binary_cross_entropy_with_logits(judged[0] @ weights[0] + weights[1], judged[1]))
        if best is None or after < best[0]:
            best = after, decay, weights
    assert best is not None
    if best[0] < before:
        with torch.no_grad():
            model.confidence_head.proj.weight.copy_(best[2][0][None])
            model.confidence_head.proj.bias.copy_(best[2][1])
    return ConfidenceFit(sum(len(p[1]) for p in parts), round(before, 4), round(min(best[0], before), 4), best[1])


@torch.no_grad()
def _rows(
    trainer: Trainer, model: DSpark, corpus: Corpus, stretch: Stretch, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs [N, d (+ r)] of the head and acceptances [N] of one document, float32 on the CPU."""
    example = corpus.example([stretch], ANCHORS, generator)
    with trainer.autocast():
        output = model.training_forward(example.features, example.ids, example.anchors)
        result = judge(output, example, trainer.head, 1.0)
        inputs = output.hidden.float()
        assert model.confidence_head is not None
        if model.confidence_head.with_markov and model.markov_head is not None:
            previous = previous_tokens(example.ids, example.anchors, example.kept, inputs.shape[2])
            inputs = torch.cat([inputs, model.markov_head.embed(previous).float()], dim=-1)
    return inputs[result.valid].cpu(), result.accept_rate[result.valid].float().cpu()


def _bce(head: ConfidenceHead, inputs: Tensor, wanted: Tensor) -> float:
    weight, bias = head.proj.weight.detach().float().cpu()[0], head.proj.bias.detach().float().cpu()
    return float(F.binary_cross_entropy_with_logits(inputs @ weight + bias, wanted))


def _logistic(inputs: Tensor, wanted: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """(weights [D], bias [1]) of the ridge logistic regression; decay counts standardised inputs, so that all weigh alike."""
    mean, scale = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    standard = (inputs - mean) / scale
    weight = torch.zeros(inputs.shape[1], requires_grad=True)
    bias = torch.logit(wanted.mean().clamp(1e-3, 1 - 1e-3)).reshape(1).clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(standard @ weight + bias, wanted) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return weight / scale, bias - (weight * mean / scale).sum()
