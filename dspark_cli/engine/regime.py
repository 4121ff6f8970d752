"""What `auto` keeps in mind: the round on its way, drafts that are being watched, and rounds of about as many requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark_cli.engine.admission import Numbers
from dspark_cli.engine.guard import Guard

FADE = 0.9  # the recent past that a round's rate is counted with: about 10 rounds, as copying ends as suddenly as it begins


@dataclass(slots=True)
class Plan:
    """One round on its way from `block` to `observe`.

    curve:  computes `verify`, which most rounds of a parked drafter never ask for
    alone:  ms of a pass without draft tokens;  plain: of a round without any
    worth:  tokens that all requests together make in a ms
    switch: ms that the pass takes longer unless `repeated` draft tokens make it as wide as the last one
    passed: the largest block that the drafter's pass drafts, 0 without a pass;  asked: for how many requests
    pass_ms: what that pass costs
    """

    shared: int
    depth: float
    limits: Sequence[int]
    curve: Callable[[], list[float]]
    alone: float
    plain: float
    worth: float
    switch: float = 0.0
    repeated: int = 0
    passed: int = 0
    asked: int = 0
    pass_ms: float = 0.0
    survival: Sequence[Numbers] = ()
    logits: Sequence[Numbers] = ()
    expected: float = 1.0  # tokens per request
    verified: int = 0
    _verify: list[float] | None = None

    @property
    def verify(self) -> list[float]:
        """ms [1 + all limits] of a pass with 0, 1, ... draft tokens."""
        if self._verify is None:
            self._verify = self.curve()
        return self._verify

    @property
    def extra_ms(self) -> float:
        """What the pass takes longer than one of plain decoding, which has one like it before it."""
        wider = self.verify[self.verified] - self.alone if self.verified else 0.0
        return wider + (0.0 if self.verified == self.repeated else self.switch)

    def round_ms(self, size: int) -> list[float]:
        """ms [size + 1] of the round by the number of draft tokens it verifies, for choosing one.

        As many as in the last round are cheaper. Not none: a drafting round that verifies nothing would only tempt the next to.
        """
        ms = self.steady_ms(size)
        if 0 < self.repeated <= size:
            ms[self.repeated] -= self.switch
        return ms

    def steady_ms(self, size: int) -> list[float]:
        """The same where the last round verified as many; several requests hardly ever do, unless none of them drafts."""
        beside = self.plain - self.alone + self.pass_ms
        wider = beside + self.switch if self.shared > 1 else beside
        return [self.verify[0] + beside, *[ms + wider for ms in self.verify[1 : size + 1]]]

    def gain(self, survival: Numbers) -> float:
        """Tokens that verifying the best prefix of a draft gains over not verifying it."""
        ms = self.round_ms(len(survival))
        best = tokens = 0.0
        for n, survives in enumerate(survival, start=1):
            tokens += survives
            best = max(best, tokens - (ms[n] - ms[0]) * self.worth)
        return best


@dataclass
class Trial:
    """Drafts to watch, and what verifying `lengths` of them would have promised.

    expected: tokens per request
    cost:     of the round, extra: of verifying alone, spent: of drafting to watch, in plain tokens
    regime:   of the round that drafted
    """

    watched: Sequence[int]
    survival: Sequence[Numbers]
    logits: Sequence[Numbers]
    lengths: Sequence[int]
    expected: float
    cost: float
    extra: float
    regime: Regime
    spent: float = 0.0


@dataclass
class Regime:
    """What was learned in rounds of about the same number of requests: what pays for one may not pay for eight.

    past:    tokens of the recent rounds, and their cost in plain tokens
    promise: tokens that a pass gains a request, its own cost not counted
    block:   block to draft, rounds until it is chosen again
    """

    pass_guard: Guard
    quick_guard: Guard
    past: tuple[float, float] = (0.0, 0.0)
    promise: float | None = None
    block: tuple[int, int] = (0, 0)
    since_plain: int = 0
    judged: bool = False  # whether what is known of the drafter was asked if it pays here

    def count(self, brought: float, cost: float, *, verified: bool) -> None:
        """A round brought so many tokens a request, in the time of `cost` plain rounds; `verified`: draft tokens were."""
        tokens, spent = self.past
        self.past = (tokens * FADE + brought, spent * FADE + cost)
        self.since_plain = self.since_plain + 1 if verified else 0
