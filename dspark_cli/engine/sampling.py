"""From logits to tokens: the distribution a sampling setting means, draws from it, and the two lossless accept rules.

Each position of an answer has random numbers of its own, one for each token of the vocabulary, and the target's token is the
winner of a race between them (`race`).

"exact":    the target's own token is found at each position; a draft is kept while it is that token. With a seed the text is
            that of plain decoding, whatever was drafted. A drafter races by the same numbers, so that it agrees with the
            target far more often than a second draw would (Daliri et al. 2024, drafter-invariant speculative decoding).
"residual": keep x with probability min(1, target_probs[x] / draft_probs[x]); at the first refusal draw from
            norm(max(0, target_probs - draft_probs)) (Leviathan et al. 2023; golden/NOTES 14-15 for the corner cases).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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


GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
RARE = 2.0**-12  # of the likeliest token's probability: tokens below it race as one, and among themselves if that wins
ALONE = 1e3  # stands for the gap to a second token where there is none
TOGETHER = 1 << 32  # the number by which they do, beyond any token's id


def uniforms(key: int, ids: IntArray) -> npt.NDArray[np.float64]:
    """float64 in (0, 1), one for each of `ids`: the numbers that SplitMix64 gives from the state `key` on, by index."""
    z = np.uint64(key) + ids.astype(np.uint64) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def race(probs: FloatArray, key: int, ids: IntArray | None = None) -> tuple[int, float]:
    """A draw from `probs` [W] (their sum may be any): each token arrives after an exponential time of its probability's rate,
    and the first one wins. Also how much more likely the second had to be to win, in nats (`ALONE` without a second).

    Times hang on `key` and the token alone, so two distributions that nearly agree give the same token nearly always: at least
    (1 - d) / (1 + d) of the times for a total variation distance d. A draw by one uniform number over cumulative sums would
    part far more often: a difference in one token moves the borders of all others.

    ids: tokens [W] that `probs` are of; None = 0, 1, 2, ...
    """
    common = probs > RARE * probs.max()
    runners = np.flatnonzero(common)
    rates = probs[runners].astype(np.float64)
    rest = float(probs.sum(dtype=np.float64)) - float(rates.sum())
    tokens = runners if ids is None else ids[runners]
    if rest > 1e-9:  # else it is what rounding left over
        tokens, rates = np.append(tokens, TOGETHER), np.append(rates, rest)
    first, gap = _first(tokens, rates, key)
    if first < len(runners):
        return int(tokens[first]), gap
    rare = np.flatnonzero(~common & (probs > 0))  # their own numbers were not used yet
    tokens = rare if ids is None else ids[rare]
    first, among = _first(tokens, probs[rare].astype(np.float64), key)
    return int(tokens[first]), min(gap, among)


def _first(tokens: IntArray, rates: npt.NDArray[np.float64], key: int) -> tuple[int, float]:
    """Index of who arrives first, and the gap to the second."""
    times = -np.log(uniforms(key, tokens)) / rates
    first = int(times.argmin())
    return first, ALONE if len(times) == 1 else float(np.log(np.partition(times, 1)[1] / times[first]))


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
    """One request's choice of tokens: its options, its random numbers, the tokens it has seen.

    gaps: of the tokens that the last call of `first` or `verify` found by "exact": by how much two logits had to change for
          another token. Empty for greedy and "residual".
    """

    gaps: list[float]

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        self.history: list[int] = list(prompt)
        self._prompt_tokens = len(prompt)
        self._bits = np.random.Philox(options.seed)
        self.gaps = []
        self._n_vocab = 0  # known with the first logits
        self._keys: list[int] = []  # of each position of the answer, as far as they were needed
        # For "residual": neither drafting nor accepting may use the numbers that decide on the target's tokens.
        self._random = np.random.Generator(self._bits.jumped())
        self._draft_random = np.random.Generator(self._bits.jumped(2))

    @property
    def chooses_drafts(self) -> bool:
        """Whether a drafter should ask for each token rather than take the best ones."""
        return not self.options.greedy

    def first(self, row: FloatArray) -> int:
        """The token after the prompt, from logits [V]."""
        self._n_vocab = len(row)
        self.gaps = []
        return self._own(row, (), 0)

    def choose_draft(
        self, row: FloatArray, drafted: Sequence[int], ids: IntArray | None = None
    ) -> tuple[int, FloatArray | None]:
        """A draft token by the drafter's logits [W] of the tokens `ids` (`DraftRequest.choose`).

        "residual": drawn, with the distribution [V] it came from. "exact": the one that the target would find if its logits
        were these; where it comes from does not matter to the output, so no distribution is kept.
        """
        residual = self.options.accept == "residual"
        if ids is not None and (residual or self.options.repeat_penalty != 1.0):
            whole = np.full(self._n_vocab, -np.inf, dtype=np.float32)
            whole[ids] = row
            row, ids = whole, None
        probs = self._probs(row, drafted)
        if residual:
            return draw(probs, self._draft_random.random()), probs
        return race(probs, self._key(len(drafted)), ids)[0], None

    def verify(self, logits: FloatArray, draft: Draft) -> tuple[int, int]:
        """Judge `draft` [k] by the target's logits [k+1, V]; returns (accepted, bonus token)."""
        options = self.options
        self.gaps = []
        if options.greedy and options.repeat_penalty == 1.0:
            best = logits.argmax(axis=1).tolist()
            accepted = 0
            for token in draft.tokens.tolist():
                if token != best[accepted]:
                    break
                accepted += 1
            return accepted, best[accepted]
        by_residual = options.accept == "residual" and not options.greedy
        return self._by_residual(logits, draft) if by_residual else self._by_match(logits, draft)

    def _by_match(self, logits: FloatArray, draft: Draft) -> tuple[int, int]:
        for i, token in enumerate(draft.tokens):
            mine = self._own(logits[i], draft.tokens[:i], i)
            if mine != token:
                return i, mine
        return len(draft), self._own(logits[-1], draft.tokens, len(draft))

    def _own(self, row: FloatArray, drafted: Sequence[int] | IntArray, ahead: int) -> int:
        """The target's own token by its logits [V], `ahead` of the next one to be committed."""
        probs = self._probs(row, drafted)
        if self.options.greedy:
            return int(probs.argmax())
        token, gap = race(probs, self._key(ahead))
        if self.options.accept == "exact":
            self.gaps.append(gap * self.options.temperature)
        return token

    def _by_residual(self, logits: FloatArray, draft: Draft) -> tuple[int, int]:
        for i, token in enumerate(draft.tokens):
            target_probs = self._probs(logits[i], draft.tokens[:i])
            draft_probs = one_hot(int(token), len(target_probs)) if draft.probs is None else draft.probs[i]
            if self._random.random() >= accept_probability(target_probs, draft_probs, int(token)):
                return i, race(residual(target_probs, draft_probs), self._key(i))[0]
        return len(draft), self._own(logits[-1], draft.tokens, len(draft))

    def _probs(self, row: FloatArray, drafted: Sequence[int] | IntArray) -> FloatArray:
        options = self.options
        if options.repeat_penalty == 1.0:
            return probabilities(row, options)
        return probabilities(row, options, [*self.history[-options.repeat_last_n :], *map(int, drafted)])

    def _key(self, ahead: int) -> int:
        """What the times of a race hang on, `ahead` of the next position to be committed."""
        position = len(self.history) - self._prompt_tokens + ahead
        while len(self._keys) <= position:
            self._keys.append(int(self._bits.random_raw()))
        return self._keys[position]

    def commit(self, tokens: Sequence[int]) -> None:
        """`tokens` became part of the answer."""
        self.history.extend(tokens)


def one_hot(token: int, size: int) -> FloatArray:
    probs = np.zeros(size, dtype=np.float32)
    probs[token] = 1.0
    return probs
