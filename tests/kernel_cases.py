"""Inputs for the kernels, chosen for the mistakes they would show, and what must be true of an output."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402

from dspark_cli.kernels.markov_step import GREEDY  # noqa: E402
from dspark_cli.kernels.verify_draft import probabilities, verify_draft  # noqa: E402

#: shares of the total by which two float32 sums over a vocabulary may differ
ROUNDING = 2e-5


@dataclass
class Step:
    base: Tensor
    latent: Tensor
    w2: Tensor
    temperature: Tensor
    uniform: Tensor


def step(n: int, width: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Step:
    random = torch.Generator().manual_seed(seed)
    return Step(
        torch.randn(n, width, generator=random).mul(2).to(dtype),
        torch.randn(n, rank, generator=random).to(dtype),
        torch.randn(width, rank, generator=random).mul(rank**-0.5).to(dtype),
        torch.tensor([0.0, 1.0, 0.3, 5.0])[torch.arange(n) % 4],
        torch.rand(n, generator=random),
    )


def share_interval(weights: Tensor, token: int) -> tuple[float, float]:
    """The part of [0, 1) that draws `token`, of weights float64 [V]."""
    share = weights / weights.sum()
    end = float(share[: token + 1].sum())
    return end - float(share[token]), end


def assert_drawn(weights: Tensor, token: int, uniform: float) -> None:
    """`token` is what inverse-CDF sampling gives, or its neighbour across a border nearer than rounding."""
    weights = weights.double()
    assert weights[token] > 0, "a token without weight was drawn"
    low, high = share_interval(weights, token)
    assert low - ROUNDING <= uniform <= high + ROUNDING


@dataclass
class Judged:
    logits: Tensor
    tokens: Tensor
    lengths: Tensor
    draft_probs: Tensor | None
    temperature: Tensor
    uniform: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        return self.logits, self.tokens, self.lengths, self.draft_probs, self.temperature, self.uniform


def judged(
    n: int, k: int, width: int, *, sampled: bool, dtype: torch.dtype = torch.float32, near: float = 0.7, seed: int = 0
) -> Judged:
    """Drafts from a distribution that is `near` the target's, so that some are accepted and some are not."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k + 1, width, generator=random).mul(3).to(dtype)
    temperature = torch.tensor([1.0, 0.0, 0.5])[torch.arange(n) % 3]
    other = near * logits[:, :k].float() + (1 - near) * 3 * torch.randn(n, k, width, generator=random)
    draft_probs = probabilities(other, torch.full((n,), 1.0))
    drawn = torch.multinomial(draft_probs.flatten(0, 1), 1, generator=random) if sampled and k else None
    tokens = other.argmax(dim=-1) if drawn is None else drawn.view(n, k)
    return Judged(
        logits,
        tokens,
        torch.randint(0, k + 1, (n,), generator=random) if n > 3 else torch.full((n,), k),
        draft_probs if sampled else None,
        temperature,
        torch.rand(n, k + 1, generator=random),
    )


def assert_judged(case: Judged, accepted: Tensor, token: Tensor, wanted: Tensor) -> None:
    """Counts equal the reference's; every last token is one that its distribution and uniform number give."""
    assert accepted.tolist() == wanted.tolist()
    target = probabilities(case.logits.double().float(), case.temperature)
    k = case.tokens.shape[1]
    for i, count in enumerate(accepted.tolist()):
        last = target[i, count].double()
        if count < int(case.lengths[i]):
            theirs = (
                torch.nn.functional.one_hot(case.tokens[i, count], last.shape[0])
                if case.draft_probs is None
                else case.draft_probs[i, count]
            )
            rest = (last - theirs.double()).clamp(min=0)
            last = rest if float(rest.sum()) > 1e-8 else last
        if float(case.temperature[i]) < GREEDY:
            assert int(token[i]) == int(case.logits[i, count].argmax())
        else:
            assert_drawn(last, int(token[i]), float(case.uniform[i, k]))


def assert_law(device: str, path: str) -> None:
    """The point of it all: a drafted token, accepted or replaced, is distributed as the target's own."""
    n, width = 50_000, 5
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2, width, generator=random).mul(1.5).expand(n, -1, -1)
    draft_probs = torch.softmax(torch.randn(1, 1, width, generator=random), dim=-1).expand(n, -1, -1)
    tokens = torch.multinomial(draft_probs[0], n, replacement=True, generator=random).view(n, 1)
    uniform = torch.rand(n, 2, generator=random)
    case = (logits, tokens, torch.ones(n).long(), draft_probs, torch.ones(n), uniform)
    accepted, token = (part.cpu() for part in verify_draft(*(part.to(device) for part in case), path=path))
    found = torch.bincount(torch.where(accepted == 1, tokens[:, 0], token), minlength=width) / n
    assert float((found - torch.softmax(logits[0, 0], dim=-1)).abs().max()) < 0.012  # five deviations of a share
