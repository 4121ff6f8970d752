"""N-gram lookup: propose what followed the same words earlier in the prompt or the answer. No model, no pass.

Confidence comes from the length of the match, from whether the two latest places with these words go on alike, and from how
such proposals fared earlier in this text, whether they were verified or not: the text that came instead tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_cli.backends.base import EMPTY_DRAFT, Draft, Drafter, DraftRequest, FloatArray

MAX_MATCH = 32  # longer matches count as this long
#: match lengths that share a history: few enough that each is soon known
BUCKETS = np.searchsorted([2, 3, 4, 5, 6, 8, 12, 16, 24, MAX_MATCH], np.arange(MAX_MATCH + 1), side="right").tolist()
#: what the place before the latest says of a token: there is none (or it went another way before), the same, another
ALONE, ALIKE, APART = range(3)
#: acceptance [3, buckets] that is assumed before anything was seen: over texts that the embedded model wrote, greedy and
#: sampled (tests/measure_lookup.py)
PRIOR = np.array(
    (
        (0.35, 0.48, 0.57, 0.68, 0.72, 0.75, 0.82, 0.87, 0.91, 0.94, 0.96),
        (0.60, 0.76, 0.82, 0.87, 0.92, 0.93, 0.95, 0.97, 0.98, 0.98, 0.99),
        (0.15, 0.23, 0.25, 0.33, 0.37, 0.30, 0.32, 0.38, 0.42, 0.40, 0.68),
    )
)
#: power of it that is believed: it is the mean over whole answers, which repeat themselves most at their end, and doubt costs
#: little, as the text that comes judges every proposal for nothing (tests/measure_replay.py --caution compares others)
CAUTION = 1.6
PRIOR_WEIGHT = 6.0  # observations that it counts for
MATCHES = (6, 4, 3, 2)  # n-grams that are indexed; the longest that is found wins
MEMORY = 200  # observations of a kind that are remembered
NOWHERE = -1


def _prior() -> list[float]:
    return (PRIOR**CAUTION * PRIOR_WEIGHT).ravel().tolist()


def _cells(agreement: Sequence[int], matched: int) -> list[int]:
    """Where `_History` keeps what is known of tokens like these, `matched` words before the first: an index of PRIOR, flat."""
    width = PRIOR.shape[1]
    return [a * width + BUCKETS[min(matched + i, MAX_MATCH)] for i, a in enumerate(agreement)]


@dataclass
class _Proposal:
    """Tokens proposed for the places from `start` on, with what each was believed by; `judged` of them were compared."""

    start: int
    tokens: list[int]
    cells: list[int]
    judged: int = 0


@dataclass
class _History:
    """Tokens of one sequence, and the two places where each n-gram ended last: n-gram -> indices of the token after it.

    kept, seen: of the proposals in this text by cell, with the prior's; lists, as a few numbers are quicker so than as arrays
    open:       the proposal that is compared with the text as it goes on; a later one would mostly tell the same
    """

    tokens: list[int] = field(default_factory=list)
    index: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)
    kept: list[float] = field(default_factory=_prior)
    seen: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT] * PRIOR.size)
    open: _Proposal | None = None

    def learn(self, anchor: int) -> None:
        """Compare the open proposal with the text, whose last token is `anchor`, up to the first difference."""
        proposal = self.open
        if proposal is None:
            return
        text = self.tokens
        for k in range(proposal.judged, len(proposal.tokens)):
            at = proposal.start + k
            if at > len(text):
                return  # still to come
            right = proposal.tokens[k] == (text[at] if at < len(text) else anchor)
            where = proposal.cells[k]
            self.seen[where] += 1
            self.kept[where] += right
            if self.seen[where] > MEMORY:  # follow the text at hand, not everything ever seen
                self.seen[where] /= 2
                self.kept[where] /= 2
            proposal.judged = k + 1
            if not right:
                break
        self.open = None

    def going_on(self, place: int, anchor: int, size: int) -> list[int]:
        """`size` tokens from `place`, where `anchor` comes after the last one."""
        tokens = self.tokens[place : place + size]
        if len(tokens) == size:
            return tokens
        # A passage that repeats with a short period runs into its own end: go round again.
        source = [*self.tokens[place:], anchor]
        return (source * (size // len(source) + 1))[:size]


class LookupDrafter(Drafter):
    """Matches the last tokens (anchor included) against all earlier ones: longest n-gram first, then the latest place."""

    name = "lookup"
    kind = "lookup"
    has_pass = False

    def __init__(self, *, block_size: int = 16) -> None:
        self.block_size = block_size
        self._histories: dict[int, _History] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._propose(request) for request in requests]

    def quick(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return self.propose(requests)

    def _history(self, seq: int) -> _History:
        if seq not in self._histories:
            self._histories[seq] = _History()
        return self._histories[seq]

    def _propose(self, request: DraftRequest) -> Draft:
        history = self._history(request.seq)
        history.learn(request.anchor)
        context = [*history.tokens[-MAX_MATCH:], request.anchor]
        size = min(request.block, self.block_size)
        places = next((at for n in MATCHES if (at := history.index.get(tuple(context[-n:]))) is not None), None)
        if places is None or size < 1:
            return EMPTY_DRAFT
        latest, before = places
        tokens = history.going_on(latest, request.anchor, size)
        agreement = [ALONE] * size
        if before != NOWHERE:
            other = history.going_on(before, request.anchor, size)
            apart = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=True)) if a != b), size)
            agreement[:apart] = [ALIKE] * apart
            if apart < size:
                agreement[apart] = APART
        cells = _cells(agreement, self._match_length(history.tokens, context, latest))
        confidence = np.asarray([history.kept[c] / history.seen[c] for c in cells], dtype=np.float32)
        if history.open is None:
            history.open = _Proposal(len(history.tokens) + 1, tokens, cells)
        return Draft(np.asarray(tokens, dtype=np.int64), confidence, source=self.kind)

    def _match_length(self, tokens: list[int], context: list[int], found: int) -> int:
        """How many tokens before `found` equal the end of the context."""
        size = 1
        limit = min(len(context), found, MAX_MATCH)
        while size < limit and tokens[found - 1 - size] == context[-1 - size]:
            size += 1
        return size

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        history = self._history(seq)
        start = len(history.tokens)
        history.tokens.extend(tokens)
        for end in range(start, len(history.tokens)):
            # The n-gram before `end` is followed by token `end`: only then can it be proposed.
            for n in MATCHES:
                if end >= n:
                    words = tuple(history.tokens[end - n : end])
                    history.index[words] = (end, history.index.get(words, (NOWHERE,))[0])

    def rewind(self, seq: int, length: int) -> None:
        history = self._history(seq)
        if length >= len(history.tokens):
            return
        kept = history.tokens[:length]
        # Most of it stays: the same text goes on, and what was learned of it holds.
        same = 2 * length >= len(history.tokens)
        self._histories[seq] = _History(kept=history.kept, seen=history.seen) if same else _History()
        self.observe(seq, kept, None)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self._histories[destination] = _History()
        self.observe(destination, self._history(source).tokens[:length], None)
