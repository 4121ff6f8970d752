"""Texts as training examples: what a drafter sees, and what the target thinks comes next.

What the target thinks is either read from a feature cache, a document at a time (a CPU: reading costs more than training),
or computed along the way for many documents at once (an accelerator: computing it again costs less than the disk, 7 kB a
token of a small target).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_cli.backends.base import IntArray
from dspark_cli.backends.torch.gguf_model import GgufModel
from dspark_cli.training.device import quick_bfloat16
from dspark_cli.training.documents import Document
from dspark_cli.training.features import FeatureCache, Stretch

AT_ONCE = 4096  # rows of whole-vocabulary logits
ALIKE = 16  # batches that are made out of one draw, by length, so that little of a batch is padding


@dataclass(frozen=True)
class Example:
    """N documents padded to S tokens, with A anchors each, ready to train on.

    ids int64 [N, S];  lengths int64 [N];  features [N, S, m*d]
    anchors int64 [N, A], ascending;  kept bool [N, A]: False fills up a document that has fewer
    hidden [N, S, d];  norms [N, S]: the target's final states and the log of its softmax's denominator
    """

    ids: Tensor
    lengths: Tensor
    features: Tensor
    hidden: Tensor
    norms: Tensor
    anchors: Tensor
    kept: Tensor


@dataclass(frozen=True)
class TargetHead:
    """The target's output rows of the draft vocabulary, float [W, d]; softcap: its logits are softcap * tanh(x / softcap)."""

    rows: Tensor
    softcap: float | None = None

    def probabilities(self, hidden: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities [..., W] of the draft vocabulary, probability [...] of all other tokens)."""
        logits = torch.nn.functional.linear(hidden.to(self.rows.dtype), self.rows).float()
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        probs = (logits - norms.unsqueeze(-1)).exp()
        inside = probs.sum(dim=-1)
        # float16 states and bfloat16 products: a sum a little over 1 is rounding
        return probs / inside.clamp(min=1).unsqueeze(-1), (1 - inside).clamp(min=0)


#: (documents, their ids [N, S], their lengths [N]) -> features [N, S, m*d], hidden [N, S, d], norms [N, S]
Think = Callable[[Sequence[Stretch], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Corpus:
    """Documents to train on, or the held-out ones. `together`: documents that make one `Example`."""

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        stretches: Sequence[Stretch],
        think: Think,
        device: torch.device | str,
        together: int,
    ) -> None:
        self._tokens, self._think, self._device, self.together = tokens, think, device, together
        self.stretches = [s for s in stretches if s.length - s.answer_start > 2]

    @classmethod
    def stored(cls, cache: FeatureCache, *, held_out: bool, device: torch.device | str = "cpu") -> Corpus:
        """The documents of a feature cache."""
        arrays = [cache.array(name) for name in ("features.f16", "hidden.f16", "norms.f32")]

        def think(stretches: Sequence[Stretch], ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            made = []
            for array in arrays:
                out = torch.zeros(*ids.shape, array.shape[1])
                for row, s in zip(out, stretches, strict=True):
                    row[: s.length] = torch.from_numpy(np.array(array[s.start : s.start + s.length]))
                made.append(out.to(device))
            features, hidden, norms = made
            return features, hidden, norms[..., 0]

        own = [s for s in cache.stretches if s.held_out == held_out]
        return cls(cache.array("tokens.i32")[:, 0], own, think, device, 1)

    @classmethod
    def live(
        cls, documents: Sequence[Document], model: GgufModel, layers: Sequence[int], *, held_out: bool, together: int
    ) -> Corpus:
        """Documents that `model` reads along the way, on its own device."""
        device = model.norm.weight.device  # type: ignore[union-attr]
        short = torch.bfloat16 if quick_bfloat16(device) else torch.float32

        @torch.no_grad()
        def think(stretches: Sequence[Stretch], ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.autocast(device.type, dtype=short, enabled=short != torch.float32):
                *wanted, hidden = model.read(ids, lengths, layers)
                rows = hidden.flatten(0, 1).split(AT_ONCE)
                norms = torch.cat([model.lm_head(part).float().logsumexp(dim=-1) for part in rows]).view_as(ids)
            return torch.cat(wanted, dim=-1).float(), hidden.float(), norms

        own = [d for d in documents if d.held_out == held_out]
        ends = np.cumsum([len(d.ids) for d in own])
        stretches = [
            Stretch(int(end) - len(d.ids), len(d.ids), d.answer_start, held_out)
            for d, end in zip(own, ends, strict=True)
        ]
        tokens = np.concatenate([np.asarray(d.ids, dtype=np.int32) for d in own]) if own else np.empty(0, np.int32)
        return cls(tokens, stretches, think, device, together)

    @property
    def tokens(self) -> int:
        """Of all documents together, prompts too."""
        return sum(s.length for s in self.stretches)

    @property
    def positions(self) -> int:
        """Answer tokens, each of which may be an anchor."""
        return sum(s.length - s.answer_start for s in self.stretches)

    def answers(self) -> Iterator[np.ndarray]:
        """Token ids of every answer, with the token before it."""
        for s in self.stretches:
            yield self._tokens[s.start + s.answer_start - 1 : s.start + s.length]

    def examples(self, stretches: Sequence[Stretch], anchors: int, generator: np.random.Generator) -> Iterator[Example]:
        """`stretches` in order, `together` at a time, with `anchors` random anchors of each answer."""
        for begin in range(0, len(stretches), self.together):
            yield self.example(stretches[begin : begin + self.together], anchors, generator)

    def example(self, stretches: Sequence[Stretch], anchors: int, generator: np.random.Generator) -> Example:
        """One example of all `stretches`. The last token of an answer cannot be an anchor."""
        lengths = [s.length for s in stretches]
        chosen = [_choose(s, anchors, generator) for s in stretches]
        most = max(map(len, chosen))
        ids = np.zeros((len(stretches), max(lengths)), dtype=np.int64)
        places = np.empty((len(stretches), most), dtype=np.int64)
        for i, (s, own) in enumerate(zip(stretches, chosen, strict=True)):
            ids[i, : s.length] = self._tokens[s.start : s.start + s.length]
            places[i] = own[-1]
            places[i, : len(own)] = own
        kept = np.arange(most) < np.array([len(own) for own in chosen])[:, None]
        on_device = [torch.from_numpy(x).to(self._device) for x in (ids, np.array(lengths), places, kept)]
        features, hidden, norms = self._think(stretches, on_device[0], on_device[1])
        return Example(on_device[0], on_device[1], features, hidden, norms, on_device[2], on_device[3])

    def draws(self, generator: np.random.Generator, count: int) -> Iterator[list[Stretch]]:
        """`count` documents at a time, for ever, a new order each time round; of like length where padding costs."""
        endless, alike = self._shuffled(generator), ALIKE if self.together > 1 else 1
        while True:
            pool = sorted(islice(endless, count * alike), key=lambda s: s.length)
            for i in generator.permutation(alike):
                yield pool[i * count : (i + 1) * count]

    def _shuffled(self, generator: np.random.Generator) -> Iterator[Stretch]:
        while True:
            for i in generator.permutation(len(self.stretches)):
                yield self.stretches[int(i)]


def _choose(stretch: Stretch, anchors: int, generator: np.random.Generator) -> IntArray:
    able = np.arange(max(1, stretch.answer_start - 1), stretch.length - 1)
    return able if len(able) <= anchors else np.sort(generator.choice(able, anchors, replace=False))


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
    answers: list[Any] = [ids[1:] for ids in corpus.answers()]
    return np.bincount(np.concatenate(answers) if answers else np.empty(0, np.int64), minlength=n_vocab)
