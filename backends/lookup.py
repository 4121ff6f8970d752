"""N-gram lookup: propose what followed the same words earlier in the prompt or the answer. No model, no pass.

Confidence comes from the length of the match and from what happened to earlier proposals with a match as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_cli.backends.base import EMPTY_DRAFT, Draft, Drafter, DraftRequest, FloatArray

MAX_MATCH = 32  # longer matches count as this long
#: match lengths that share a history: few enough that each is soon known
BUCKETS = np.searchsorted([2, 3, 4, 5, 6, 8, 12, 16, 24, MAX_MATCH], np.arange(MAX_MATCH + 1), side="right")
#: acceptance by bucket that is assumed before anything was seen
PRIOR = (0.35, 0.40, 0.53, 0.66, 0.68, 0.76, 0.85, 0.90, 0.93, 0.97, 0.99)
PRIOR_WEIGHT = 6.0  # observations that it counts for
MATCHES = (6, 4, 3, 2)  # n-grams that are indexed; the longest that is found wins
MEMORY = 200  # observations a bucket of match lengths remembers


@dataclass
class _History:
    """Tokens of one sequence, and where each n-gram ended last: n-gram -> index of the token after it."""

    tokens: list[int] = field(default_factory=list)
    index: dict[tuple[int, ...], int] = field(default_factory=dict)
    matched: int = 0  # match length of the last proposal


class LookupDrafter(Drafter):
    """Matches the last tokens (anchor included) against all earlier ones: longest n-gram first, then the latest place."""

    name = "lookup"
    kind = "lookup"
    has_pass = False

    def __init__(self, *, block_size: int = 16) -> None:
        self.block_size = block_size
        self._histories: dict[int, _History] = {}
        self._kept = np.asarray(PRIOR) * PRIOR_WEIGHT
        self._seen = np.full(len(PRIOR), PRIOR_WEIGHT)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._propose(request) for request in requests]

    def quick(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return self.propose(requests)

    def _propose(self, request: DraftRequest) -> Draft:
        history = self._histories.setdefault(request.seq, _History())
        context = [*history.tokens[-MAX_MATCH:], request.anchor]
        size = min(request.block, self.block_size)
        found = next((at for n in MATCHES if (at := history.index.get(tuple(context[-n:]))) is not None), None)
        if found is None or size < 1:
            return EMPTY_DRAFT
        history.matched = self._match_length(history.tokens, context, found)
        tokens = history.tokens[found : found + size]
        # A passage that repeats with a short period runs into its own end: go round again.
        period = len(history.tokens) + 1 - found
        source = [*history.tokens[found:], request.anchor]
        while len(tokens) < size:
            tokens.append(source[len(tokens) % period])
        buckets = BUCKETS[np.minimum(history.matched + np.arange(len(tokens)), MAX_MATCH)]
        confidence = (self._kept[buckets] / self._seen[buckets]).astype(np.float32)
        return Draft(np.asarray(tokens, dtype=np.int64), confidence, source=self.kind)

    def _match_length(self, tokens: list[int], context: list[int], found: int) -> int:
        """How many tokens before `found` equal the end of the context."""
        size = 1
        limit = min(len(context), found, MAX_MATCH)
        while size < limit and tokens[found - 1 - size] == context[-1 - size]:
            size += 1
        return size

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        history = self._histories.setdefault(seq, _History())
        start = len(history.tokens)
        history.tokens.extend(tokens)
        for end in range(start, len(history.tokens)):
            # The n-gram before `end` is followed by token `end`: only then can it be proposed.
            for n in MATCHES:
                if end >= n:
                    history.index[tuple(history.tokens[end - n : end])] = end

    def feedback(self, seq: int, verified: int, accepted: int) -> None:
        matched = self._histories[seq].matched
        for position in range(min(verified, accepted + 1)):
            bucket = BUCKETS[min(matched + position, MAX_MATCH)]
            self._seen[bucket] += 1
            self._kept[bucket] += position < accepted
            if self._seen[bucket] > MEMORY:  # follow the text at hand, not everything ever seen
                self._seen[bucket] /= 2
                self._kept[bucket] /= 2

    def rewind(self, seq: int, length: int) -> None:
        history = self._histories.setdefault(seq, _History())
        if length >= len(history.tokens):
            return
        kept = history.tokens[:length]
        self._histories[seq] = _History()
        self.observe(seq, kept, None)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self._histories[destination] = _History()
        self.observe(destination, self._histories.get(source, _History()).tokens[:length], None)
