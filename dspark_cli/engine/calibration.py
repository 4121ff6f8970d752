"""From what a drafter believes to what happens: reliability figures, STS, and online recalibration.

STS (sequential temperature scaling, DSpark paper): one temperature per position on the logit of the confidence, chosen
left to right on a grid to minimise the ECE of the *cumulative* product, with earlier positions already fixed.
Online: Platt scaling of the confidence, refitted after every round from rounds before it (history only: lossless).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BINS = 10  # equal-width bins of ECE
GRID = np.exp(np.linspace(np.log(0.1), np.log(10.0), 121))  # temperatures tried; holds 1.0
EDGE = 1e-4  # confidences are kept this far from 0 and 1: no head is surer than that


def logit(p: Array) -> Array:
    clipped = np.maximum(np.minimum(p, 1.0 - EDGE), EDGE)  # quicker than np.clip on a few numbers
    return np.log(clipped / (1.0 - clipped))


def logit_of(p: float) -> float:
    """The same of one number."""
    p = max(min(p, 1.0 - EDGE), EDGE)
    return math.log(p / (1.0 - p))


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


# -- figures -----------------------------------------------------------------------------------------------------------


def reliability(predicted: Array, happened: Array, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Per bin that has any: (mean prediction, share that happened, count). Arrays [n]; `happened` is 0 or 1."""
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = np.bincount(place, weights=predicted, minlength=bins)
    share = np.bincount(place, weights=happened, minlength=bins)
    return [(float(mean[i] / n), float(share[i] / n), int(n)) for i, n in enumerate(count) if n]


def ece(predicted: Array, happened: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of prediction and share over bins, weighted by count. 0 without data."""
    rows = reliability(predicted, happened, bins)
    return sum(abs(p - s) * n for p, s, n in rows) / max(1, len(predicted))


def brier(predicted: Array, happened: Array) -> float:
    """Mean squared distance of prediction and outcome: better the surer *and* the truer. 0 without data."""
    return float(np.mean((predicted - happened) ** 2)) if len(predicted) else 0.0


def auc(predicted: Array, happened: Array) -> float | None:
    """Chance that a token that was accepted had the higher prediction (ties count half); None if all ended alike."""
    positive = happened > 0.5
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return None
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2.0  # mean rank of each distinct value
    return float((rank[inverse][positive].sum() - n_pos * (n_pos + 1) / 2.0) / (n_pos * n_neg))


# -- STS ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """Rounds of one drafter, as STS needs them.

    confidence: float64 [n, k]  as the drafter gave it; NaN where a draft was shorter
    verified:   int64 [n]       tokens the target checked;  accepted: int64 [n]  tokens it kept
    """

    confidence: Array
    verified: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rounds: Sequence[tuple[Sequence[float], int, int]]) -> Recorded:
        """From (confidences, verified, accepted) of each round."""
        width = max((len(c) for c, _, _ in rounds), default=0)
        confidence = np.full((len(rounds), width), np.nan)
        for i, (values, _, _) in enumerate(rounds):
            confidence[i, : len(values)] = values
        counts = np.asarray([(v, a) for _, v, a in rounds], dtype=np.int64).reshape(-1, 2)
        return cls(confidence, counts[:, 0], counts[:, 1])

    def __len__(self) -> int:
        return len(self.verified)

    @property
    def block_size(self) -> int:
        return self.confidence.shape[1]

    def at(self, position: int) -> npt.NDArray[np.bool_]:
        """Which rounds verified `position` (0-based), [n]."""
        return (self.verified > position) & ~np.isnan(self.confidence[:, position])

    def survival(self) -> list[float]:
        """Share of the rounds that verified a position in which it was accepted."""
        return [float((self.accepted[at] > k).mean()) for k in range(self.block_size) if (at := self.at(k)).any()]


@dataclass(frozen=True)
class Sts:
    """Temperatures by position; positions beyond them use the last. () leaves confidences as they are."""

    temperatures: tuple[float, ...] = ()

    def __call__(self, confidence: Array) -> Array:
        """Calibrated conditional confidences [..., k] from the drafter's own."""
        if not self.temperatures:
            return confidence
        return sigmoid(logit(confidence) / self.upto(confidence.shape[-1]))

    def upto(self, width: int) -> Array:
        """Temperatures [width]."""
        return np.asarray(self._upto(width))

    def _upto(self, width: int) -> Sequence[float]:
        temperatures = self.temperatures or (1.0,)
        return (temperatures + temperatures[-1:] * width)[:width]

    def divided(self, logits: list[float]) -> list[float]:
        """Logits [k] of one draft, each divided by its temperature."""
        if not self.temperatures:
            return logits
        return [x / t for x, t in zip(logits, self._upto(len(logits)), strict=True)]


def fit_sts(rounds: Recorded, grid: Array = GRID, at_least: int = 50) -> Sts:
    """Temperatures left to right. A position that fewer than `at_least` rounds verified ends the list."""
    temperatures: list[float] = []
    before = np.ones(len(rounds))
    for position in range(rounds.block_size):
        at = rounds.at(position)
        if at.sum() < at_least:
            break
        logits = logit(rounds.confidence[:, position])
        happened = (rounds.accepted[at] > position).astype(float)
        errors = [ece(before[at] * sigmoid(logits[at] / t), happened) for t in grid]
        # Of equally good temperatures the one that changes least.
        best = min(range(len(grid)), key=lambda i: (round(errors[i], 12), abs(float(np.log(grid[i])))))
        temperatures.append(float(grid[best]))
        before = before * sigmoid(logits / grid[best])
    return Sts(tuple(temperatures))


def report(rounds: Recorded, sts: Sts) -> list[dict[str, Any]]:
    """Per position: rounds, survival, and ECE of the cumulative product and AUC of the confidence, before and after."""
    rows = []
    raw, scaled = np.cumprod(rounds.confidence, axis=1), np.cumprod(sts(rounds.confidence), axis=1)
    for position in range(rounds.block_size):
        at = rounds.at(position)
        if not at.any():
            continue
        happened = (rounds.accepted[at] > position).astype(float)
        reached = at & (rounds.accepted >= position)
        own = (rounds.accepted[reached] > position).astype(float)
        rows.append(
            {
                "position": position + 1,
                "rounds": int(at.sum()),
                "survival": float(happened.mean()),
                "ece_before": ece(raw[at, position], happened),
                "ece_after": ece(scaled[at, position], happened),
                "auc": auc(rounds.confidence[reached, position], own) if reached.any() else None,
            }
        )
    return rows


def pooled(rounds: Recorded, sts: Sts) -> tuple[Array, Array]:
    """(predicted survival, what happened) of every verified position together: the data of a reliability plot."""
    products = np.cumprod(sts(rounds.confidence), axis=1, dtype=np.float64)
    at = np.stack([rounds.at(k) for k in range(rounds.block_size)], axis=1)
    happened = rounds.accepted[:, None] > np.arange(rounds.block_size)
    return products[at], happened[at].astype(float)


# -- online ------------------------------------------------------------------------------------------------------------


@dataclass
class OnlinePlatt:
    """sigmoid(slope * logit + offset), kept fitted to the recent past by one Newton step a round.

    Information about the parameters fades (`memory` observations), and what has faded is replaced by the prior's: without
    evidence the drafter is believed.
    """

    memory: float = 200.0
    slope: float = 1.0
    offset: float = 0.0
    _information: tuple[float, float, float] = field(default=(16.0, 0.0, 1.0))  # slope, mixed, offset
    _PRIOR = (16.0, 0.0, 1.0)  # slope within a quarter of 1, offset within 1 of 0

    def __call__(self, logits: Array) -> Array:
        return sigmoid(self.slope * logits + self.offset)

    def of(self, logits: Sequence[float]) -> list[float]:
        """The same of a few numbers, which is quicker than as an array."""
        slope, offset = self.slope, self.offset
        return [1.0 / (1.0 + math.exp(-slope * x - offset)) for x in logits]

    def update(self, logits: Sequence[float], happened: Sequence[float]) -> None:
        """Positions that were reached, with what became of them (0 or 1). A few: quicker as numbers than as arrays."""
        if not logits:
            return
        keep = (1.0 - 1.0 / self.memory) ** len(logits)
        fresh, (prior_slope, _, prior_offset) = 1.0 - keep, self._PRIOR
        ss, sb, bb = self._information
        ss, sb, bb = keep * ss + fresh * prior_slope, keep * sb, keep * bb + fresh * prior_offset
        slope, offset = self.slope, self.offset
        # The prior pulls as much as it was topped up.
        pull_slope, pull_offset = fresh * prior_slope * (1.0 - slope), -fresh * prior_offset * offset
        for x, came in zip(logits, happened, strict=True):
            p = 1.0 / (1.0 + math.exp(-slope * x - offset))
            weight = p - p * p
            if weight < 0.02:  # a very sure belief must still be able to turn
                weight = 0.02
            ss, sb, bb = ss + weight * x * x, sb + weight * x, bb + weight
            pull_slope, pull_offset = pull_slope + (came - p) * x, pull_offset + came - p
        determinant = ss * bb - sb * sb
        self.slope += (bb * pull_slope - sb * pull_offset) / determinant
        self.offset += (ss * pull_offset - sb * pull_slope) / determinant
        self.slope = min(max(self.slope, 0.05), 3.0)
        self.offset = min(max(self.offset, -6.0), 6.0)
        self._information = (ss, sb, bb)

    def fade(self, share: float) -> None:
        """Time went by without evidence: what was learned counts for `share` of what it did."""
        self.slope = 1.0 + share * (self.slope - 1.0)
        self.offset *= share
        old, prior = self._information, self._PRIOR
        self._information = tuple(share * a + (1.0 - share) * b for a, b in zip(old, prior, strict=True))  # type: ignore[assignment]


class PositionHistory:
    """Conditional acceptance by position, for drafts without any confidence: a prior of 2 observations of 0.6, fading."""

    def __init__(self, memory: float = 200.0) -> None:
        self._memory = memory
        self._kept: list[float] = []
        self._seen: list[float] = []

    def upto(self, width: int) -> Array:
        """float64 [width]."""
        self._grow(width)
        return np.asarray(self._kept[:width]) / np.asarray(self._seen[:width])

    def update(self, reached: int, accepted: int) -> None:
        """A round judged positions 0 .. reached - 1 and kept the first `accepted` of them."""
        self._grow(reached)
        for k in range(reached):
            fade = 0.5 if self._seen[k] > self._memory else 1.0
            self._seen[k] = self._seen[k] * fade + 1.0
            self._kept[k] = self._kept[k] * fade + (k < accepted)

    def _grow(self, width: int) -> None:
        missing = width - len(self._seen)
        self._seen += [2.0] * missing
        self._kept += [1.2] * missing
