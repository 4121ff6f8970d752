"""Never slower: speculation that does not pay is parked, and probed again ever more rarely.

Gains are counted in tokens of plain decoding: a round that brought 2 tokens in the time of 1.5 plain ones gained 0.5. Two
accounts are kept. `expected` takes the tokens that calibrated confidences promise: little noise, so it may park soon.
`observed` takes the tokens that came: much noise, so it is given more patience, and catches what confidences hide.
Everything rests on rounds that are over, so the guard cannot bias the output.

Whether it pays is found out by watching: the drafter drafts, nothing is verified, and the plain tokens of the next rounds
tell what would have been accepted. That costs the drafter's pass and no verifying.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

FADE = 0.985  # share of an account that lasts to the next round
TRIAL_SHARE = 0.005  # of the time until the next trial that one which only watches may take, once a few have failed
FIRST_SHARE = 0.0125  # the same after the first that fails; twice that if what little was seen was good
NEAR = 0.9  # a speed over plain decoding that another text may well lift above 1
LOOK_SHARE = 0.015  # of an answer that a trial at its beginning may take, where other texts are drafted well
LOOK_AFTER = 6  # rounds into the answer: its first words are much the same whatever follows
LENT = 1.5  # tokens that an answer may lose to speculation before it has gained any
# Where earlier runs promise a gain, stopping early costs more than it saves (docs/measurements.md).
LENT_TRUSTED = 6.0
LENT_SHARE = 0.01  # of its rounds, on top of that


@dataclass
class Budget:
    """What speculation may cost one answer beyond what it gained there, in tokens of plain decoding.

    Trials that fail and drafts that are refused add up, each for good reasons, and a short answer has no time to earn it back.
    Where several answers are decoded at once the account is a mean over them and goes on from one to the next.

    lent: tokens that may be lost before any were gained
    """

    lent: float = LENT
    gained: float = 0.0
    rounds: int = 0

    def renew(self) -> None:
        """Another answer begins."""
        self.gained, self.rounds = 0.0, 0

    def observe(self, brought: float, cost: float) -> None:
        """A round brought so many tokens a request, in the time of `cost` plain rounds."""
        self.gained += brought - cost
        self.rounds += 1

    @property
    def spent(self) -> bool:
        return self.gained < -(self.lent + LENT_SHARE * self.rounds)


@dataclass
class Guard:
    """Whether to speculate, from what it brought.

    first_wait: rounds parked after the first failure; doubles with each probe that fails, up to `longest_wait`,
                and for probes that only watch up to where they take `TRIAL_SHARE` of the time
    patience:   tokens an account may lose before parking, expected and observed; a probe has `probe_share` of it
    trusted:    whether earlier runs showed that it pays: twice the patience; otherwise the first rounds are a probe too
    hopeful:    whether they showed that it about pays on the whole: then it does on some texts, and each new one gets a look
    requests:   that decode together: accounts are means over them, so their noise, and the patience, shrink with the root
    """

    first_wait: int = 20
    longest_wait: int = 320
    patience: tuple[float, float] = (1.2, 3.0)
    probe_share: float = 0.25
    trusted: bool = False
    hopeful: bool = False
    requests: int = 1
    active: bool = True
    reason: str = ""
    _expected: float = 0.0
    _observed: float = 0.0
    _probing: bool = False
    _wait: int = 0
    _left: int = 0
    _halved: int = 0  # what `hasten` takes off
    _rate: float = 0.0  # speed over plain decoding at which it was parked
    _spent: float = 0.0
    _price: float = 0.0  # of the last trial, in plain tokens
    _waited: int = 0
    _tokens: float = field(default=0.0)
    _cost: float = field(default=0.0)

    def __post_init__(self) -> None:
        if self.trusted:
            # Parking early costs more than it saves, as with the budget.
            self.first_wait, self.probe_share = max(1, self.first_wait // 2), 2 * self.probe_share
            self.patience = (2 * self.patience[0], 2 * self.patience[1])
        soon, late = self.patience
        self.patience = (soon / sqrt(self.requests), late / sqrt(self.requests))
        self._probing = not self.trusted
        self._wait = self.first_wait

    @property
    def probing(self) -> bool:
        """Whether this is a trial: little is known of the drafter, or it failed before."""
        return self.active and self._probing

    def skipped(self) -> None:
        """A round went by without speculating. After enough of them the next one is a probe."""
        if self.active:
            return
        self._left, self._waited = self._left - 1, self._waited + 1
        if self._left <= 0:
            self.active, self._probing = True, True
            self._expected = self._observed = self._tokens = self._cost = 0.0

    def hasten(self) -> None:
        """Another text begins, for which the drafter may do better: half of the wait is enough if little was missing, and
        where the drafter is known to suit some texts, as long a wait as the last trial cost."""
        if self.active:
            return
        if self._rate >= NEAR:
            self._left -= self._halved
            self._halved = 0
        if self.hopeful and self._waited >= self._price / LOOK_SHARE:
            self._left = min(self._left, LOOK_AFTER)

    def renew(self) -> None:
        """Another text begins, and what was lost on the last one says little about it: as after a first failure."""
        self._wait = self.first_wait
        self._left = min(self._left, self.first_wait)

    def observe(self, expected: float, observed: float, cost: float, *, spent: float | None = None) -> None:
        """A speculating round cost as much as `cost` plain tokens; it promised `expected` tokens and brought `observed`.

        spent: it only would have: drafts were watched, which cost `spent` plain tokens
        """
        if not self.active:
            return
        self._tokens = self._tokens * FADE + expected
        self._cost = self._cost * FADE + cost
        share = self.probe_share if self._probing else 1.0
        soon, late = self.patience[0] * share, self.patience[1] * share
        if spent is not None:
            self._spent += spent
            late *= 2.0  # nothing is lost by it: noise gets more time
        # Past gains must not hide a loss for long: an account holds no more than it may lose.
        self._expected = min(self._expected * FADE + expected - cost, soon)
        self._observed = min(self._observed * FADE + observed - cost, late)
        if self._expected < -soon and self._observed < 0.0:  # what came may refute a belief that is too low
            self.park(self._tokens / self._cost, "expected")
        elif self._probing and self._expected >= soon and self._observed >= 0.0:
            self._probing, self._wait, self._spent = False, self.first_wait, 0.0
        elif self._observed < -late or (
            self._probing and self._spent > self.patience[0]
        ):  # ... nor be watched for ever
            self.park(max(0.0, 1.0 + self._observed / self._cost), "observed")

    def park(self, rate: float, how: str, *, trial: float = 0.0) -> None:
        """Stop speculating. `rate`: speed over plain decoding;  `how`: "expected" or "observed";  `trial`: what the next trial
        will take, in plain tokens, if none was made yet."""
        self.active = self._probing = False
        unsure = ", too little seen to be sure" if rate >= 1.0 else ""  # watched as long as it may be
        self._rate, self.reason = rate, f"{rate:.2f}x {how}{unsure}"
        spent, self._spent = self._spent or trial, 0.0
        self._price, self._waited = spent, 0
        longest = min(self.longest_wait, int(spent / TRIAL_SHARE)) if spent else self.longest_wait
        if trial:  # earlier runs have had the short waits
            self._wait = max(self.first_wait, longest)
        elif spent:
            self._wait = max(self._wait, min(longest, int(spent / (FIRST_SHARE if rate < 1.0 else 2 * FIRST_SHARE))))
        self._left, self._halved = self._wait, self._wait // 2
        self._wait = max(self.first_wait, min(2 * self._wait, longest))
        self._expected = self._observed = 0.0
