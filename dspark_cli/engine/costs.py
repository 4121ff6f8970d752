"""What a round costs on this machine: milliseconds of verify, draft and injection, measured and refined by every round.

Nothing is assumed about the shape of a curve: a pass of four tokens may be cheaper than one of three. Only where nothing
was measured yet is a value taken from its measured neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DRIFT_RATE = 0.2  # share of a surprise that is put down to the machine as a whole (other load, clock frequency)
CELL_RATE = 0.03  # least share that is put down to this width alone
PROFILE_WEIGHT = 8  # a profiled point counts as much as this many rounds
OUTLIER = 2.0  # a pass this many times off is no evidence about its width
DISAGREES = 1.35  # online costs this far from the profile, relative to one another, refute it
ENOUGH = 24  # observations of a width before it may refute the profile


class Curve:
    """Milliseconds over a whole number of tokens, dense; points never measured are interpolated between those that were.

    known: tokens -> ms, at least one point with tokens >= 1
    """

    def __init__(self, known: Mapping[int, float], size: int | None = None) -> None:
        if not known or any(not math.isfinite(ms) or ms < 0 for ms in known.values()) or min(known) < 1:
            raise ValueError(f"a cost curve needs measured points of at least one token, got {dict(known)}")
        self.known = {int(n): float(ms) for n, ms in sorted(known.items())}
        self.profiled = dict(self.known)
        self.seen: dict[int, int] = {}
        self._stale = False
        self._ms = self._dense(max(size or 0, max(self.known)))

    def _dense(self, size: int) -> list[float]:
        """ms [size + 1]; entry 0 is 0. Beyond the last known point the curve goes on with its mean slope."""
        tokens = np.fromiter(self.known, dtype=np.float64)
        ms = np.fromiter(self.known.values(), dtype=np.float64)
        wanted = np.arange(size + 1, dtype=np.float64)
        dense = np.interp(wanted, tokens, ms)
        slope = max(0.0, (ms[-1] - ms[0]) / (tokens[-1] - tokens[0])) if len(ms) > 1 else ms[0] * 0.3
        dense += np.maximum(0.0, wanted - tokens[-1]) * slope
        dense[0] = 0.0
        numbers: list[float] = dense.tolist()
        return numbers

    def upto(self, size: int, start: int = 0) -> list[float]:
        """ms of `start`, ..., `size` tokens."""
        if self._stale or size >= len(self._ms):
            self._ms = self._dense(max(size + size // 4, len(self._ms) - 1))
            self._stale = False
        return self._ms[start : size + 1]

    def at(self, tokens: int) -> float:
        known = self.known.get(tokens)
        return self.upto(tokens, tokens)[0] if known is None else known

    def refine(self, tokens: int, ratio: float) -> None:
        """A pass of `tokens` took `ratio` times what `at(tokens)` says."""
        seen = self.seen[tokens] = self.seen.get(tokens, 0) + 1
        now = self.known.get(tokens)
        if now is None:
            self.known = dict(sorted({**self.known, tokens: self.at(tokens) * ratio}.items()))
            self._stale = True
            return
        weight = PROFILE_WEIGHT if tokens in self.profiled else 0
        now = self.known[tokens] = now * ratio ** max(CELL_RATE, 1.0 / (seen + weight))
        if tokens + 1 in self.known and (tokens == 1 or tokens - 1 in self.known):
            self._ms[tokens] = now
        else:
            self._stale = True  # neighbours that were never measured move with it

    def disagreement(self) -> float:
        """How far apart the online corrections of well-seen profiled points are (1 = the profile's shape holds)."""
        ratios = [
            self.known[n] / self.profiled[n] for n, seen in self.seen.items() if seen >= ENOUGH and n in self.profiled
        ]
        return max(ratios) / min(ratios) if len(ratios) > 1 else 1.0


@dataclass
class CostModel:
    """Costs of one loaded pair.

    verify:      tokens in the target's pass -> ms, at `depth` cached tokens a sequence, where the last pass had as many
    switch_ms:   what a pass of another number of tokens than the last takes longer: libllama builds its graph anew
    slope:       ms that one more cached token of one sequence adds to a pass: slope[0] + slope[1] * tokens, neither negative
    crowded:     whether those are all tokens of the pass, of whatever sequence; else that sequence's own
    draft:       tokens asked for -> ms of the drafter's pass for one sequence at `depth`; None without a pass
    several:     the same for some other number of sequences: (sequences, curve); None where only one was measured
    draft_slope: ms that one more cached token of one sequence adds to it: draft_slope[0] + draft_slope[1] * tokens asked for
    inject:      sequences -> ms of handing a round's features to the drafter; None if nothing was handed over yet
    own_ms:      overhead of a round outside all passes;  pass_own_ms: the same where the drafter's pass ran
    measured:    whether a profile stands behind this; else only the online refinement does
    """

    verify: Curve
    depth: int = 0
    slope: tuple[float, float] = (0.0, 0.0)
    crowded: bool = True
    draft: Curve | None = None
    several: tuple[int, Curve] | None = None
    draft_slope: tuple[float, float] = (0.0, 0.0)
    inject: Curve | None = None
    own_ms: float = 0.3
    pass_own_ms: float = 0.3
    switch_ms: float = 0.0
    measured: bool = True
    drift: float = 1.0
    _shared_verify: dict[int, Curve] = field(default_factory=dict)
    _shared_draft: dict[int, Curve] = field(default_factory=dict)

    @classmethod
    def unmeasured(cls) -> CostModel:
        """A guess to start from where there is no profile: the shape of a small CPU, the scale of the first pass seen."""
        return cls(Curve({1: 10.0, 2: 14.0, 4: 20.0, 8: 32.0, 16: 58.0}), measured=False)

    def verify_ms(self, shared: int, depth: float, size: int, start: int = 0) -> list[float]:
        """ms of passes of `start`, ..., `size` tokens, for `shared` sequences with `depth` cached tokens each, as of now."""
        curve, drift = self._curve(shared).upto(size, start), self.drift
        if depth == self.depth or self.slope == (0.0, 0.0):
            return [ms * drift for ms in curve]
        fixed, each = self._deeper(self.slope, shared, depth, 0), self._deeper((0.0, self.slope[1]), shared, depth, 1)
        if depth > self.depth:
            return [(ms + fixed + n * each) * drift for n, ms in enumerate(curve, start)]
        # Never below half of what was measured: the line is fitted on two depths only.
        return [max(ms + fixed + n * each, 0.5 * ms) * drift for n, ms in enumerate(curve, start)]

    def verify_at(self, shared: int, depth: float, tokens: int) -> float:
        """The last of `verify_ms(shared, depth, tokens)`."""
        ms = self._curve(shared).at(tokens)
        if depth != self.depth and self.slope != (0.0, 0.0):
            ms = max(ms + self._deeper(self.slope, shared, depth, tokens), 0.5 * ms)
        return ms * self.drift

    def _deeper(self, slope: tuple[float, float], shared: int, depth: float, tokens: float) -> float:
        """ms that a pass of `tokens` over all sequences takes longer than at the profiled depth."""
        fixed, per_token = slope
        return (depth - self.depth) * (fixed * shared + per_token * tokens * (shared if self.crowded else 1))

    def plain_ms(self, shared: int, depth: float) -> float:
        """ms of a round of plain decoding."""
        return self.verify_at(shared, depth, shared) + self.own_ms

    def pass_ms(self, shared: int, block: int, depth: float | None = None) -> float:
        """ms that drafting `block` tokens each for `shared` sequences adds to a round, injection included.

        depth: cached tokens a sequence; None = as profiled
        """
        if self.draft is None:
            return 0.0
        inject = 0.0 if self.inject is None else self.inject.at(shared) * self.drift
        return self._draft_ms(shared, block, depth) + inject + max(0.0, self.pass_own_ms - self.own_ms)

    def _draft_ms(self, shared: int, block: int, depth: float | None) -> float:
        """ms of the drafter's pass alone, as of now."""
        ms = self._draft_curve(shared).at(block)
        if depth is not None and self.draft_slope != (0.0, 0.0):
            ms = max(0.5 * ms, ms + self._deeper(self.draft_slope, shared, depth, shared * block))
        return ms * self.drift

    def _draft_curve(self, shared: int) -> Curve:
        """Each number of sequences has a curve of its own, at first on the line through the two that were measured."""
        assert self.draft is not None
        if shared == 1:
            return self.draft
        if shared not in self._shared_draft:
            known = self.draft.known
            if self.several is not None:
                sequences, curve = self.several
                share = (shared - 1) / (sequences - 1)
                known = {n: max(ms, ms + share * (curve.at(n) - ms)) for n, ms in self.draft.known.items()}
            self._shared_draft[shared] = Curve(known)
        return self._shared_draft[shared]

    def _curve(self, shared: int) -> Curve:
        """Each number of sequences has a curve of its own, that starts as the profile and is refined by its own rounds."""
        if shared == 1:
            return self.verify
        if shared not in self._shared_verify:
            self._shared_verify[shared] = Curve(self.verify.known)
        return self._shared_verify[shared]

    def observe_verify(self, shared: int, tokens: int, depth: float, ms: float, *, switched: bool = False) -> None:
        """A pass over `tokens` took `ms`. A clock that stood still or went back is no observation.

        switched: the pass before had another number of tokens
        """
        if not 0 < ms < math.inf:
            return
        if switched:
            ms = max(ms - self.switch_ms * self.drift, 0.5 * ms)
        ratio = ms / self.verify_at(shared, depth, tokens)
        if not self.measured:
            # The first pass sets the scale of the guess, whatever it is.
            self.drift *= ratio
            self.measured = True
            return
        ratio = _bounded(ratio)
        self.drift *= ratio**DRIFT_RATE
        self._curve(shared).refine(tokens, ratio ** (1 - DRIFT_RATE))

    def observe_draft(self, shared: int, block: int, depth: float, ms: float) -> None:
        """A drafter's pass of `block` tokens for each of `shared` sequences with `depth` cached tokens took `ms`."""
        if not 0 < ms < math.inf:
            return
        if self.draft is None:
            self.draft = Curve({block: ms / self.drift})
            return
        now = self._draft_ms(shared, block, depth)
        self._draft_curve(shared).refine(block, _bounded(ms / now) if now > 0 else 1.0)

    def observe_overhead(self, own_ms: float) -> None:
        """A round's time outside the passes, where the drafter's did not run."""
        self.own_ms = _smoothed(self.own_ms, own_ms)

    def observe_pass(self, shared: int, own_ms: float, inject_ms: float) -> None:
        """The same where it did, for `shared` sequences, whose features took `inject_ms`."""
        self.pass_own_ms = _smoothed(self.pass_own_ms, own_ms)
        if not 0 < inject_ms < math.inf:
            return
        if self.inject is None:
            self.inject = Curve({shared: inject_ms / self.drift})
        # After a pause all that waited goes in at once: bounded, such a round moves little.
        self.inject.refine(shared, _bounded(inject_ms / (self.inject.at(shared) * self.drift)))

    @property
    def disagrees(self) -> bool:
        """Whether what rounds really cost refutes the profile."""
        return self.verify.disagreement() > DISAGREES

    def as_dict(self) -> dict[str, Any]:
        return {
            "verify": self.verify.known,
            "depth": self.depth,
            "slope": list(self.slope),
            "crowded": self.crowded,
            "draft": None if self.draft is None else self.draft.known,
            "several": None if self.several is None else {"sequences": self.several[0], "ms": self.several[1].known},
            "draft_slope": list(self.draft_slope),
            "inject": None if self.inject is None else self.inject.known,
            "own_ms": self.own_ms,
            "pass_own_ms": self.pass_own_ms,
            "switch_ms": self.switch_ms,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CostModel:
        """The inverse of `as_dict`. Raises ValueError, KeyError or TypeError for anything else."""

        def curve(points: Mapping[str, float]) -> Curve:
            return Curve({int(n): float(ms) for n, ms in dict(points).items()})

        def pair(slope: Sequence[float]) -> tuple[float, float]:
            first, second = map(float, slope)
            if not (first >= 0 and second >= 0):
                raise ValueError("a pass does not get quicker with depth")
            return first, second

        verify = curve(raw["verify"])
        draft, inject = (None if raw[name] is None else curve(raw[name]) for name in ("draft", "inject"))
        several = None if raw["several"] is None else (int(raw["several"]["sequences"]), curve(raw["several"]["ms"]))
        own_ms, pass_own_ms, switch_ms = (float(raw[name]) for name in ("own_ms", "pass_own_ms", "switch_ms"))
        if min(verify.known.values()) <= 0 or not all(0 <= ms < math.inf for ms in (own_ms, pass_own_ms, switch_ms)):
            raise ValueError("not a cost profile")
        if several is not None and several[0] < 2:
            raise ValueError("several sequences are at least 2")
        return cls(
            verify,
            int(raw["depth"]),
            pair(raw["slope"]),
            bool(raw["crowded"]),
            draft,
            several,
            pair(raw["draft_slope"]),
            inject,
            own_ms=own_ms,
            pass_own_ms=pass_own_ms,
            switch_ms=switch_ms,
        )


def _bounded(ratio: float) -> float:
    return OUTLIER if ratio > OUTLIER else max(ratio, 1 / OUTLIER)


def _smoothed(old: float, new: float) -> float:
    """A moving mean that an outlier moves little."""
    if not 0 <= new < math.inf:
        return old
    return old + 0.05 * (min(new, 4 * old + 0.1) - old)
