"""A feature cache as training examples: what a drafter sees, and what the target thinks comes next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.base import IntArray
from dspark_cli.training.features import FeatureCache, Stretch


@dataclass(frozen=True)
class Example:
    """A document of S tokens with A anchors, ready to train on.

    ids [1, S];  features [1, S, m*d];  anchors int64 [1, A], ascending
    hidden [S, d];  norms [S]: the target's final states and the log of its softmax's denominator
    """

    ids: Tensor
    features: Tensor
    hidden: Tensor
    norms: Tensor
    anchors: Tensor


@dataclass(frozen=True)
class TargetHead:
    """The target's output rows of the draft vocabulary, float [W, d]."""

    rows: Tensor

    def probabilities(self, hidden: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities [..., W] of the draft vocabulary, probability [...] of all other tokens)."""
        logits = torch.nn.functional.linear(hidden.to(self.rows.dtype), self.rows).float()
        probs = (logits - norms.unsqueeze(-1)).exp()
        inside = probs.sum(dim=-1)
        # float16 states and bfloat16 products: a sum a little over 1 is rounding
        return probs / inside.clamp(min=1).unsqueeze(-1), (1 - inside).clamp(min=0)


class Corpus:
    """The trained-on or the held-out documents of a cache."""

    def __init__(self, cache: FeatureCache, *, held_out: bool, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._arrays = {name: cache.array(name) for name in ("tokens.i32", "features.f16", "hidden.f16", "norms.f32")}
        self.stretches = [s for s in cache.stretches if s.held_out == held_out and s.length - s.answer_start > 2]

    @property
    def positions(self) -> int:
        """Answer tokens, each of which may be an anchor."""
        return sum(s.length - s.answer_start for s in self.stretches)

    def answers(self) -> Iterator[np.ndarray]:
        """Token ids of every answer, with the token before it."""
        for s in self.stretches:
            yield self._arrays["tokens.i32"][s.start + s.answer_start - 1 : s.start + s.length, 0]

    def example(self, stretch: Stretch, anchors: int, generator: np.random.Generator) -> Example:
        """`anchors` random anchors of the answer; its last token cannot be one."""
        rows = slice(stretch.start, stretch.start + stretch.length)
        able = np.arange(max(1, stretch.answer_start - 1), stretch.length - 1)
        chosen = able if len(able) <= anchors else np.sort(generator.choice(able, anchors, replace=False))
        return Example(
            ids=self._tensor("tokens.i32", rows)[:, 0].long()[None],
            features=self._tensor("features.f16", rows).float()[None],
            hidden=self._tensor("hidden.f16", rows).float(),
            norms=self._tensor("norms.f32", rows)[:, 0],
            anchors=torch.from_numpy(chosen)[None].to(self._device),
        )

    def _tensor(self, name: str, rows: slice) -> Tensor:
        return torch.from_numpy(np.array(self._arrays[name][rows])).to(self._device)

    def shuffled(self, generator: np.random.Generator) -> Iterator[Stretch]:
        """Documents for ever, a new order each time round."""
        while True:
            for i in generator.permutation(len(self.stretches)):
                yield self.stretches[int(i)]


def draft_vocabulary(corpus: Corpus, size: int, n_vocab: int, always: Sequence[int] = ()) -> IntArray:
    """int64 [size], ascending: the most frequent ids of the answers and `always`."""
    order = _counts(corpus, n_vocab).astype(np.float64)
    order[list(always)] = np.inf
    return np.sort(np.argsort(-order, kind="stable")[:size])


def covered(corpus: Corpus, ids: IntArray) -> float:
    """The share of the answer tokens that are among `ids`."""
    counts = _counts(corpus, int(ids.max()) + 1)
    return float(counts[ids].sum() / max(1, counts.sum()))


def _counts(corpus: Corpus, n_vocab: int) -> IntArray:
    """How often each id [n_vocab or more] comes in the answers."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for ids in corpus.answers():
        found = np.bincount(ids[1:])
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
    return counts
