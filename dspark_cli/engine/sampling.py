"""From logits to tokens: the distribution a sampling setting means, draws from it, and the two lossless accept rules.

"exact":    draw the target's own token at each position; a draft is kept while it is that token. The uniform numbers are
            used up one a committed token, so with a seed the text is that of plain decoding with the same seed.
"residual": keep x with probability min(1, target_probs[x] / draft_probs[x]); at the first refusal draw from
            norm(max(0, target_probs - draft_probs)) (Leviathan et al. 2023; golden/NOTES 14-15 for the corner cases).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_cli.backends.base import Draft, FloatArray, IntArray
from dspark_cli.engine.rounds import SamplingOptions

TINY = 1e-8  # below this a probability, or a residual's mass, counts as none (golden/NOTES 14-15)


def penalized(row: FloatArray, recent: Sequence[int], penalty: float) -> FloatArray:
    """Logits [V] with the repetition penalty on `recent`: positive ones divided by it, negative ones multiplied."""
    if penalty == 1.0 or not len(recent):
        return row
    row = row.copy()
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    row[ids] = np.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return row


def probabilities(row: FloatArray, options: SamplingOptions, recent: Sequence[int] = ()) -> FloatArray:
    """float32 [V]: the distribution `options` make of logits [V]. `recent`: tokens for the repetition penalty."""
    row = penalized(row, recent[-options.repeat_last_n :], options.repeat_penalty)
    if options.greedy:
        probs = np.zeros_like(row)
        probs[row.argmax()] = 1.0
        return probs
    if not options.filters:
        weights = np.exp((row - row.max()) / np.float32(options.temperature))
        weights /= weights.sum()
        return weights
    kept = _largest(row, options.top_k) if 0 < options.top_k < len(row) else np.arange(len(row))
    scaled = row[kept] / np.float32(options.temperature)
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    keep = np.ones(len(kept), dtype=bool)
    if options.top_p < 1.0:
        # All tokens below the mean of the mass to cut weigh less than that mass together: none can be kept, so sort the rest.
        rest = np.flatnonzero(weights >= (1.0 - options.top_p) / len(weights))
        order = rest[np.argsort(-weights[rest], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        keep[:] = False
        keep[order] = before < options.top_p  # the token that crosses the threshold stays
    if options.min_p > 0.0:
        keep &= weights >= options.min_p * weights.max()
    probs = np.zeros_like(row)
    probs[kept[keep]] = weights[keep] / weights[keep].sum()
    return probs


BLOCK = 256  # two-level searches over the vocabulary: a pass over blocks, then one block


def _largest(row: FloatArray, count: int) -> IntArray:
    """Indices of the `count` largest of [V], in no order. The count-th largest block maximum bounds them from below."""
    whole = len(row) // BLOCK * BLOCK
    peaks = row[:whole].reshape(-1, BLOCK).max(axis=1)
    if count > len(peaks):
        return np.argpartition(row, -count)[-count:]
    candidates = np.flatnonzero(row >= np.partition(peaks, -count)[-count])
    return candidates[np.argpartition(row[candidates], -count)[-count:]]


def draw(probs: FloatArray, uniform: float) -> int:
    """The token that inverse-CDF sampling with `uniform` in [0, 1) gives."""
    starts = np.arange(0, len(probs), BLOCK)
    ends = np.cumsum(np.add.reduceat(probs, starts), dtype=np.float64)
    wanted = uniform * ends[-1]
    block = min(int(np.searchsorted(ends, wanted, side="right")), len(ends) - 1)
    inside = probs[starts[block] : starts[block] + BLOCK]
    rest = wanted - (ends[block - 1] if block else 0.0)
    token = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), rest, side="right"))
    if token == len(inside):  # sums in another order: the last ulp may lie beyond this block's own total
        token = int(np.flatnonzero(inside)[-1])
    return int(starts[block]) + token


def accept_probability(target_probs: FloatArray, draft_probs: FloatArray, token: int) -> float:
    """min(1, target/draft) at `token`; probabilities [V]."""
    return min(1.0, float(target_probs[token]) / max(float(draft_probs[token]), TINY))


def residual(target_probs: FloatArray, draft_probs: FloatArray) -> FloatArray:
    """norm(max(0, target - draft)) [V]; the target itself where no mass is left."""
    rest = np.maximum(target_probs - draft_probs, 0.0)
    mass = rest.sum()
    return target_probs if mass <= TINY else rest / mass


class Sampler:
    """One request's choice of tokens: its options, its random numbers, the tokens it has seen."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        self.history: list[int] = list(prompt)
        self._random = np.random.Generator(np.random.Philox(options.seed))
        # Draft choices must not use up the numbers that decide on the target's tokens.
        self._draft_random = np.random.Generator(np.random.Philox(options.seed).jumped())

    @property
    def samples_drafts(self) -> bool:
        """Whether a drafter should draw its tokens rather than take the best ones."""
        return self.options.accept == "residual" and not self.options.greedy

    def first(self, row: FloatArray) -> int:
        """The token after the prompt, from logits [V]."""
        return self._draw(self._probs(row, ()))

    def choose_draft(self, row: FloatArray, drafted: Sequence[int]) -> tuple[int, FloatArray]:
        """A draft token drawn from the drafter's logits [V], with the distribution it came from (`DraftRequest.choose`)."""
        probs = self._probs(row, drafted)
        return draw(probs, self._draft_random.random()), probs

    def verify(self, logits: FloatArray, draft: Draft) -> tuple[int, int]:
        """Judge `draft` [k] by the target's logits [k+1, V]; returns (accepted, bonus token)."""
        options = self.options
        if options.greedy and options.repeat_penalty == 1.0:
            best = logits.argmax(axis=1)
            wrong = np.flatnonzero(best[:-1] != draft.tokens)
            accepted = int(wrong[0]) if len(wrong) else len(draft)
            return accepted, int(best[accepted])
        by_residual = options.accept == "residual" and not options.greedy
        return self._by_residual(logits, draft) if by_residual else self._by_match(logits, draft)

    def _by_match(self, logits: FloatArray, draft: Draft) -> tuple[int, int]:
        for i, token in enumerate(draft.tokens):
            mine = self._draw(self._probs(logits[i], draft.tokens[:i]))
            if mine != token:
                return i, mine
        return len(draft), self._draw(self._probs(logits[-1], draft.tokens))

    def _by_residual(self, logits: FloatArray, draft: Draft) -> tuple[int, int]:
        for i, token in enumerate(draft.tokens):
            target_probs = self._probs(logits[i], draft.tokens[:i])
            draft_probs = one_hot(int(token), len(target_probs)) if draft.probs is None else draft.probs[i]
            if self._random.random() >= accept_probability(target_probs, draft_probs, int(token)):
                return i, self._draw(residual(target_probs, draft_probs))
        return len(draft), self._draw(self._probs(logits[-1], draft.tokens))

    def _probs(self, row: FloatArray, drafted: Sequence[int] | IntArray) -> FloatArray:
        options = self.options
        if options.repeat_penalty == 1.0:
            return probabilities(row, options)
        return probabilities(row, options, [*self.history[-options.repeat_last_n :], *map(int, drafted)])

    def _draw(self, probs: FloatArray) -> int:
        if self.options.greedy:
            return int(probs.argmax())
        return draw(probs, self._random.random())

    def commit(self, tokens: Sequence[int]) -> None:
        """`tokens` became part of the answer."""
        self.history.extend(tokens)


def one_hot(token: int, size: int) -> FloatArray:
    probs = np.zeros(size, dtype=np.float32)
    probs[token] = 1.0
    return probs
