"""Figures of an answer while it is being made: the last second, the course of acceptance, what speculation is doing.

Beside `Stats`, which counts a whole answer, this is the other half of "every figure is computed in one place". Time is the
rounds' own: milliseconds of decoding, without what passes between rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from dspark_cli.engine.rounds import Round
from dspark_cli.engine.stats import Stats

WINDOW_MS = 1000.0  # "now"
BUCKET_MS = 250.0  # one point of the acceptance course
KEPT_POINTS = 240
KEPT_BLOCKS = 64

#: plain = nothing drafts; silent = nothing to propose; unverified = proposals that do not pay; parked = switched off for now
Doing = Literal["plain", "silent", "unverified", "speculating", "parked"]


@dataclass(frozen=True)
class Block:
    """A round that drafted or verified something: tokens drafted >= verified >= accepted."""

    drafted: int
    verified: int
    accepted: int


@dataclass
class Live:
    """A reader of the rounds of one answer, one request.

    plain_ms: what plain decoding would have taken for the same tokens, by the costs of the moment; None if unknown
    points: acceptance rate per BUCKET_MS of decoding, oldest first; None where nothing was verified
    blocks: the last rounds that drafted something, oldest first
    """

    stats: Stats = field(default_factory=Stats)
    points: deque[float | None] = field(default_factory=lambda: deque(maxlen=KEPT_POINTS))
    blocks: deque[Block] = field(default_factory=lambda: deque(maxlen=KEPT_BLOCKS))
    last: Round | None = None
    plain_ms: float | None = None
    _window: deque[Round] = field(default_factory=deque)
    _window_ms: float = 0.0
    _bucket: Stats = field(default_factory=Stats)

    @classmethod
    def of(cls, rounds: Iterable[Round]) -> Live:
        live = cls()
        for item in rounds:
            live.add(item)
        return live

    def add(self, item: Round, plain_round_ms: float | None = None) -> None:
        """Take in a round. plain_round_ms: what a round of plain decoding costs at this moment."""
        self.stats.add(item)
        self.last = item
        if item.is_prefill:
            return
        if plain_round_ms is not None:
            self.plain_ms = (self.plain_ms or 0.0) + plain_round_ms * len(item.tokens)
        self._window.append(item)
        self._window_ms += item.times.total
        while len(self._window) > 1 and self._window_ms - self._window[0].times.total >= WINDOW_MS:
            self._window_ms -= self._window.popleft().times.total
        if item.drafted:
            self.blocks.append(Block(item.drafted, item.verified, item.accepted))
        self._bucket.add(item)
        if self._bucket.decode_s * 1e3 >= BUCKET_MS:
            self.points.append(self._bucket.acceptance_rate if self._bucket.verified else None)
            self._bucket = Stats()

    @property
    def now(self) -> Stats:
        """Figures of the last second of decoding."""
        return Stats.of(self._window)

    @property
    def plain_tok_s(self) -> float | None:
        """Plain decoding over the same time, so that a machine that slows down meanwhile does not count for or against."""
        return self.stats.committed / self.plain_ms * 1e3 if self.plain_ms else None

    @property
    def context_used(self) -> int:
        """Tokens of prompt and answer."""
        return self.stats.prompt_tokens + self.stats.tokens

    @property
    def doing(self) -> Doing:
        """What speculation does, judged by the last second; `plain` before the first round."""
        if not self._window:
            return "plain"
        if any(item.verified for item in self._window):
            return "speculating"
        if self._window[-1].parked:
            return "parked"
        return "unverified" if any(item.drafted for item in self._window) else "silent"

    @property
    def reason(self) -> str:
        """Why speculation is parked, in the schedule's words; "" while it is not."""
        return (self.last.parked if self.last else None) or ""


@dataclass(frozen=True)
class Race:
    """One answer decoded twice: with drafting, and plainly.

    first_difference: index of the first token that differs; None when identical
    margin:           first minus second logit of the plain pass there: a near-tie if it is small
    """

    speculative: Stats
    plain: Stats
    first_difference: int | None
    margin: float | None = None

    @property
    def identical(self) -> bool:
        return self.first_difference is None

    @property
    def ratio(self) -> float | None:
        """Speed with drafting over plain; None where one of them decoded nothing."""
        fast, plain = self.speculative.decode_tok_s, self.plain.decode_tok_s
        return fast / plain if fast and plain else None


def times_plain(tok_s: float, plain_tok_s: float | None) -> float | None:
    """Speed over that of plain decoding; None where either is not known."""
    return tok_s / plain_tok_s if tok_s and plain_tok_s else None
