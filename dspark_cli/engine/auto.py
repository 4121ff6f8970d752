"""The default policy: how much to verify, and whether to draft at all, from costs measured on this machine.

Every decision rests on rounds that are over, and on confidences up to the position decided on (see admission.py), so the
output keeps the target's law. What a token is worth is counted in tokens of plain decoding (one = the time of a plain round).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_cli.backends.base import Draft
from dspark_cli.engine.admission import Array, admit, convex_minorant
from dspark_cli.engine.calibration import OnlinePlatt, PositionHistory, Sts, logit
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.guard import Guard
from dspark_cli.engine.rounds import Times
from dspark_cli.engine.schedule import Outcome, Schedule, likely

OWN_HISTORY = ("lookup",)  # drafters whose confidence is what became of their recent drafts
FADE = 0.98  # the recent past that a round's rate is counted with: about 50 rounds
AFTER_PARKING = 0.7  # how much of what was learned of a drafter still counts at a probe
REVIEW = 8  # rounds between two choices of the block to draft
TRUSTED = 1.05  # a drafter that gained this much in earlier runs, at this machine's costs, gets more patience
HOPELESS = 0.95  # one that would have lost this much is parked before its first pass


@dataclass
class Belief:
    """What one drafter's confidences are worth: its STS temperatures, then what its own recent rounds say.

    survival: mean survival by position from earlier runs (shipped, or from `dspark calibrate`); () if unknown
    learns:   whether recent rounds correct it; not where the drafter's confidence is a record of its recent rounds itself
    """

    sts: Sts = field(default_factory=Sts)
    survival: tuple[float, ...] = ()
    learns: bool = True
    platt: OnlinePlatt = field(default_factory=OnlinePlatt)
    history: PositionHistory = field(default_factory=PositionHistory)

    def logits(self, drafts: Sequence[Draft]) -> list[Array]:
        """Per draft the logits [k] of its confidences after STS."""
        sizes = [len(draft) for draft in drafts]
        width = max(sizes)
        unknown = logit(self.history.upto(width)) if any(d.confidence is None for d in drafts) else None
        if unknown is not None:
            return [unknown[:n] for n in sizes]
        joined = logit(np.concatenate([d.confidence for d in drafts]).astype(np.float64))  # type: ignore[misc]
        if self.sts.temperatures:
            temperatures = self.sts.upto(width)
            joined = joined / np.concatenate([temperatures[:n] for n in sizes])
        return np.split(joined, np.cumsum(sizes)[:-1]) if len(sizes) > 1 else [joined]

    def learn(self, seen: Sequence[tuple[Outcome, Array]]) -> None:
        """Outcomes of one round with the logits they were judged by."""
        logits, happened = [], []
        for outcome, x in seen:
            reached = min(outcome.judged, outcome.kept + 1)
            if outcome.draft.confidence is None:
                self.history.update(reached, outcome.kept)
                continue
            logits.append(x[:reached])
            happened.append(np.arange(reached) < outcome.kept)
        if logits and self.learns:
            self.platt.update(np.concatenate(logits), np.concatenate(happened).astype(np.float64))


@dataclass
class _Plan:
    """One round on its way from `block` to `observe`."""

    shared: int
    depth: float
    blocks: Sequence[int]
    passed: int = 0  # the largest block that the drafter's pass drafts; 0 without a pass
    survival: Sequence[Array] = ()
    logits: Sequence[Array] = ()
    expected: float = 0.0  # tokens per request
    verified: int = 0


class AutoSchedule(Schedule):
    """DESIGN section 2: verify the prefix that maximises tokens per ms, draft while that pays, park when it does not.

    costs:   what passes cost here; without a profile they are learned from the first rounds
    beliefs: drafter source ("dspark", "lookup", ...) -> calibration
    label:   what the user should know of the machine when speculation is parked, such as the target's format
    cap:     most tokens in a verify pass over all requests, from the memory plan
    """

    name = "auto"

    def __init__(
        self,
        costs: CostModel | None = None,
        *,
        beliefs: Mapping[str, Belief] | None = None,
        label: str = "",
        cap: int | None = None,
    ) -> None:
        self.costs = costs or CostModel.unmeasured()
        self.beliefs = dict(beliefs or {})
        self.label = label
        self.cap = cap
        self.pass_guard = Guard()
        # A quick draft costs nothing until it is verified, and its first token is judged by the bonus token for free.
        self.quick_guard = Guard(first_wait=4)
        self._plan = _Plan(1, 0.0, ())
        self._past = (0.0, 0.0)  # tokens, and their cost in plain tokens, of the recent rounds
        self._promise: float | None = None  # tokens that a pass gains a request, its own cost not counted
        self._recent: deque[Array] = deque(maxlen=48)  # survivals [k] of drafts that passes made
        self._block: tuple[int, int] = (0, 0)  # block to draft, rounds until it is chosen again
        self._pass_sources: set[str] = set()
        self._smooth: tuple[tuple[int, int], Array] | None = None
        self._parked: str | None = None
        self._judged_earlier = False

    # -- whether to draft ----------------------------------------------------------------------------------------------

    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        self._plan = _Plan(len(limits), depth, limits)
        return list(limits)

    def passes(self, blocks: Sequence[int], quick: Sequence[Draft]) -> list[int]:
        plan = self._plan
        wanted = max(blocks)
        if not wanted:
            return [0] * len(blocks)
        self._judge_earlier_runs(wanted)
        if not self.pass_guard.active:
            return [0] * len(blocks)
        wanted = min(wanted, self._pass_block(wanted))
        worth = self._worth(plan.shared)
        cost = self.costs.pass_ms(plan.shared, wanted) * worth / plan.shared
        asked = []
        for block, draft in zip(blocks, quick, strict=True):
            gain = self._gain(self._beliefs([draft])[0][0], worth) if len(draft) and self.quick_guard.active else 0.0
            better = likely(draft, block) if self._promise is None else gain >= self._promise - cost
            asked.append(0 if gain > 0 and better else min(block, wanted))
        plan.passed = max(asked)
        return asked

    def _judge_earlier_runs(self, block: int) -> None:
        """Before the first pass: what earlier runs of this drafter saw may say that it pays here, or that it cannot."""
        if self._judged_earlier:
            return
        self._judged_earlier = True
        known = next((b.survival for source, b in self.beliefs.items() if source != "lookup" and b.survival), ())[
            :block
        ]
        if known:
            tokens = 1.0 + np.concatenate([[0.0], np.cumsum(known)])
            speed = tokens / self._round_ms(len(known), passed=block) * self.costs.plain_ms(1, self._plan.depth)
            rate = float(speed.max())
            self.pass_guard = Guard(trusted=rate >= TRUSTED)
            if rate < HOPELESS:
                self.pass_guard.park(rate, "expected")

    def _pass_block(self, limit: int) -> int:
        """The block whose tokens pay for what drafting them costs, over the drafts of the recent past."""
        block, left = self._block
        if left > 0 and block:
            self._block = (block, left - 1)
            return block
        best = limit
        if len(self._recent) >= REVIEW and self.costs.draft is not None:
            shared, worth = self._plan.shared, self._worth(self._plan.shared)
            gains = np.stack([_extended(a, limit) for a in self._recent]).cumsum(axis=1) - self._extra_ms(limit) * worth
            best_upto = np.maximum.accumulate(np.maximum(gains, 0.0), axis=1).mean(axis=0)
            costs = [self.costs.pass_ms(shared, b + 1) * worth / shared for b in range(limit)]
            best = int((best_upto - costs).argmax()) + 1
        self._block = (best, REVIEW)
        return best

    def _worth(self, shared: int) -> float:
        """Tokens that all requests together make in a ms: plain decoding's, or the recent rate if that is better."""
        tokens, cost = self._past
        rate = max(1.0, (tokens + 1.0) / (cost + 1.0))
        return shared * rate / self.costs.plain_ms(shared, self._plan.depth)

    def _extra_ms(self, size: int) -> Array:
        """ms [size] that verifying 1, 2, ... draft tokens adds to a plain round."""
        shared = self._plan.shared
        verify = self.costs.verify_ms(shared, self._plan.depth, shared + size)
        return verify[shared + 1 :] - verify[shared]

    def _gain(self, survival: Array, worth: float) -> float:
        """Tokens that verifying the best prefix of a draft gains over not verifying it."""
        gains = survival.cumsum() - self._extra_ms(len(survival)) * worth
        return max(0.0, float(gains.max()))

    # -- how much to verify --------------------------------------------------------------------------------------------

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        plan = self._plan
        plan.survival, plan.logits = self._beliefs(drafts)
        offered = self._offered(drafts, plan.survival)
        sizes = [len(a) for a in offered]
        if not any(sizes):
            plan.expected, plan.verified = 1.0, 0
            return [0] * len(drafts)
        sampled = any(d.probs is not None for d in drafts)
        ms = self._round_ms(sum(plan.blocks) if sampled else sum(sizes), plan.passed)
        if sampled:
            ms = self._smoothed(ms)
        tokens, cost = self._past
        carry = (tokens * plan.shared, min(cost, tokens) * self.costs.plain_ms(plan.shared, plan.depth))
        cap = None if self.cap is None else self.cap - plan.shared
        lengths = admit(offered, ms, early_stop=sampled, carry=carry, cap=cap)
        plan.verified = sum(lengths)
        promised = sum(float(a[:n].sum()) for a, n in zip(offered, lengths, strict=True) if n)
        plan.expected = 1.0 + promised / plan.shared
        return lengths

    def _beliefs(self, drafts: Sequence[Draft]) -> tuple[list[Array], list[Array]]:
        """(survivals, logits), one array [k] a draft."""
        nothing = np.empty(0)
        survival, logits = [nothing] * len(drafts), [nothing] * len(drafts)
        for source in dict.fromkeys(d.source for d in drafts if len(d)):
            belief = self._belief(source)
            mine = [i for i, d in enumerate(drafts) if len(d) and d.source == source]
            for i, x in zip(mine, belief.logits([drafts[i] for i in mine]), strict=True):
                known = drafts[i].confidence is not None
                logits[i] = x
                survival[i] = np.cumprod(belief.platt(x) if known else belief.history.upto(len(x)))
        return survival, logits

    def _belief(self, source: str) -> Belief:
        return self.beliefs.setdefault(source, Belief(learns=source not in OWN_HISTORY))

    def _offered(self, drafts: Sequence[Draft], survival: Sequence[Array]) -> Sequence[Array]:
        """Survivals of what may be verified: nothing of quick drafts while those are parked."""
        if self._plan.passed or self.quick_guard.active:
            return survival
        worth = self._worth(self._plan.shared)
        if any(self._gain(a, worth) > 0 for a in survival if len(a)):
            self.quick_guard.skipped()
        return [a[:0] for a in survival]

    def _round_ms(self, size: int, passed: int) -> Array:
        """ms [size + 1] of this round by the number of draft tokens it verifies."""
        plan = self._plan
        fixed = self.costs.own_ms + (self.costs.pass_ms(plan.shared, passed) if passed else 0.0)
        return self.costs.verify_ms(plan.shared, plan.depth, plan.shared + size)[plan.shared :] + fixed

    def _smoothed(self, ms: Array) -> Array:
        """The convex curve below `ms` (over what could have been drafted, whatever was); long ones are kept a while."""
        key = (len(ms), self._plan.shared)
        if len(ms) <= 64:
            return convex_minorant(ms)
        if self._smooth is None or self._smooth[0] != key or self.costs.verify.version % 16 == 0:
            self._smooth = (key, convex_minorant(ms))
        return self._smooth[1]

    # -- what came of it -----------------------------------------------------------------------------------------------

    def observe(self, outcomes: Sequence[Outcome], times: Times) -> None:
        plan, costs, shared = self._plan, self.costs, len(outcomes)
        costs.observe_verify(shared, shared + plan.verified, plan.depth, times.verify)
        costs.observe_overhead(times.own, times.inject if plan.passed else None)
        if plan.passed:
            costs.observe_draft(shared, plan.passed, times.draft)
        self._learn(outcomes)

        plain_ms = costs.plain_ms(shared, plan.depth)
        cost = float(self._round_ms(plan.verified, plan.passed)[plan.verified]) / plain_ms
        brought = 1.0 + sum(o.accepted for o in outcomes) / shared
        self._past = (self._past[0] * FADE + brought, self._past[1] * FADE + cost)
        if plan.passed:
            worth = self._worth(shared)
            extra = float(self._extra_ms(plan.verified)[-1]) * worth / shared if plan.verified else 0.0
            gain = plan.expected - 1.0 - extra
            self._promise = gain if self._promise is None else self._promise + 0.1 * (gain - self._promise)
            self._pass_sources.update(o.draft.source for o in outcomes if len(o.draft))
            self._recent.extend(a for a, o in zip(plan.survival, outcomes, strict=True) if len(o.draft))
            self.pass_guard.observe(plan.expected, brought, cost)
        else:
            self._skip_pass()
            if plan.verified:
                self.quick_guard.observe(plan.expected, brought, cost)
        self._parked = None if plan.passed or plan.verified else self._why_parked()

    def _skip_pass(self) -> None:
        parked = not self.pass_guard.active
        self.pass_guard.skipped()
        if parked and self.pass_guard.active:  # a probe is due: text may have changed since the drafter was last seen
            for source in self._pass_sources:
                self._belief(source).platt.fade(AFTER_PARKING)

    def _learn(self, outcomes: Sequence[Outcome]) -> None:
        seen: dict[str, list[tuple[Outcome, Array]]] = {}
        for outcome, x in zip(outcomes, self._plan.logits, strict=True):
            if outcome.judged and len(x):
                seen.setdefault(outcome.draft.source, []).append((outcome, x))
        for source, rows in seen.items():
            self._belief(source).learn(rows)

    def _why_parked(self) -> str | None:
        guard = next((g for g in (self.pass_guard, self.quick_guard) if not g.active), None)
        if guard is None:
            return None
        return f"{guard.reason} on this machine" + (f" with {self.label}" if self.label else "")

    @property
    def parked(self) -> str | None:
        return self._parked


def _extended(survival: Array, size: int) -> Array:
    """Survivals [size] of a shorter draft, going on as they went on average."""
    if len(survival) >= size:
        return survival[:size]
    ratio = float(survival[-1]) ** (1.0 / len(survival))
    return np.concatenate([survival, survival[-1] * ratio ** np.arange(1, size - len(survival) + 1)])
