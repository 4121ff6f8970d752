"""The default policy: how much to verify, and whether to draft at all, from costs measured on this machine.

Every decision rests on rounds that are over, and on confidences up to the position decided on (see admission.py), so the
output keeps the target's law. What a token is worth is counted in tokens of plain decoding (one = the time of a plain round).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from dspark_cli.backends.base import Draft
from dspark_cli.engine.admission import Numbers, admit, convex_minorant
from dspark_cli.engine.beliefs import NOTHING, Belief
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.guard import LENT, LENT_TRUSTED, Budget, Guard
from dspark_cli.engine.regime import Plan, Regime, Trial
from dspark_cli.engine.rounds import Times
from dspark_cli.engine.schedule import Outcome, Schedule, likely

OWN_HISTORY = ("lookup",)  # drafters whose confidence is what became of their recent drafts
TRIAL = 2  # tokens of a sampled draft that a trial verifies at most (a deterministic one is watched, none is verified)
WATCHED = 2  # requests whose drafts a trial watches at most: the features of each must go in first
AFTER_PARKING = 0.7  # how much of what was learned of a drafter still counts at a probe
NEW_TEXT = 0.3  # the same where another text begins, for a drafter that is known to suit some
ENOUGH = 8  # drafts seen before the block to draft is chosen by them
REVIEW = 32  # rounds between two choices of the block to draft
MARGINAL = 1.15  # a gain below this may be a wrong cost of plain decoding: ...
PLAIN_EVERY = 32  # ... then so many rounds at most go by without a plain one to measure it by
WORTH = (
    1.03  # speed over not verifying that a draft must promise: less is within what costs and confidences are wrong by
)
TRUSTED = 1.15  # a drafter that gained this much in earlier runs, at this machine's costs, need not be tried out first
HOPELESS = 0.95  # one that would have lost this much is parked before its first pass
QUICK_WAIT = 4  # rounds parked at first: a quick draft's first token is judged by the bonus token for free
SURE_GAIN = 0.5  # tokens that a quick draft must promise where the answer's budget is spent
UNKNOWN = "not known yet to pay"  # why nothing is verified while the drafter is watched for the first time


class AutoSchedule(Schedule):
    """DESIGN section 2: verify the prefix that maximises tokens per ms, draft while that pays, park when it does not.

    costs:   what passes cost here; without a profile they are learned from the first rounds
    beliefs: drafter source ("dspark", "lookup", ...) -> calibration
    label:   what the user should know of the machine when speculation is parked, such as the target's format
    cap:     most tokens in a verify pass over all requests, from the memory plan
    guard:   makes the guards of the drafter's pass, one for each about as many requests
    """

    name = "auto"

    def __init__(
        self,
        costs: CostModel | None = None,
        *,
        beliefs: Mapping[str, Belief] | None = None,
        label: str = "",
        cap: int | None = None,
        guard: Callable[..., Guard] = Guard,
    ) -> None:
        self.costs = costs or CostModel.unmeasured()
        self.beliefs = dict(beliefs or {})
        self.label = label
        self.cap = cap
        self._guard = guard
        self._budget = Budget()
        self._regimes: dict[int, Regime] = {}
        self._now = self._regime(1)
        self._plan = Plan(1, 0.0, (), lambda: [0.0], 0.0, 1.0, 1.0)
        self._recent: deque[Numbers] = deque(maxlen=48)  # survivals [k] of drafts that passes made
        self._pass_sources: set[str] = set()
        self._smooth: dict[int, list[float]] = {}  # by the number of tokens that would repeat the last pass
        self._smooth_left = 0
        self._parked: str | None = None
        self._asked_earlier = False
        self._room = 1 << 30  # draft tokens that the pass has room for
        self._width = 0  # tokens of the last pass; 0: there was a prompt in it
        self._trial: Trial | None = None  # drafts that are being watched
        self._watched: Sequence[int] = ()  # of the drafts chosen from last

    def _regime(self, requests: int) -> Regime:
        about = round(math.log2(requests))
        if about not in self._regimes:
            quick = Guard(first_wait=QUICK_WAIT, requests=2**about)
            self._regimes[about] = Regime(self._guard(requests=2**about), quick)
        return self._regimes[about]

    @property
    def pass_guard(self) -> Guard:
        """Whether drafting by the drafter's pass pays, for as many requests as decode now."""
        return self._now.pass_guard

    @property
    def quick_guard(self) -> Guard:
        """The same of quick drafts."""
        return self._now.quick_guard

    # -- whether to draft ----------------------------------------------------------------------------------------------

    def begin(self, requests: int) -> None:
        if requests == 1:
            self._width = 0
            self._budget.renew()
            regime = self._regime(1)
            regime.pass_guard.hasten()
            regime.quick_guard.renew()
            if regime.pass_guard.hopeful:
                self._fade(NEW_TEXT)
            if known := self._known:
                # What many texts were like says more about this one than the last did (docs/measurements.md).
                self._recent.clear()
                self._recent.extend(known)
                regime.judged = False

    def limit(self, room: int, requests: int) -> int:
        self._room = room
        return max(0, room)

    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        shared = len(limits)
        if shared != self._plan.shared:
            self._now = self._regime(shared)
        alone = self.costs.verify_at(shared, depth, shared)
        plain = alone + self.costs.own_ms
        tokens, cost = self._now.past
        rate = max(1.0, (tokens + 1.0) / (cost + 1.0))  # plain decoding's, or that of recent rounds if it is better
        most = shared + sum(limits)
        self._plan = Plan(
            shared,
            depth,
            limits,
            lambda: self.costs.verify_ms(shared, depth, most, start=shared),
            alone,
            plain,
            shared * rate / plain,
            self.costs.switch_ms * self.costs.drift,
            # Of several requests the number of tokens hardly ever stays, but where none of them drafts.
            self._width - 1 if shared == 1 else 0,
        )
        return list(limits)

    def passes(self, blocks: Sequence[int], quick: Sequence[Draft]) -> list[int]:
        plan = self._plan
        wanted = max(blocks)
        if not wanted:
            return [0] * len(blocks)
        self._judge_by_what_is_known(wanted)
        now = self._now
        if not now.pass_guard.active or self._trial is not None or self._plain_is_due or self._budget.spent:
            return [0] * len(blocks)
        wanted = min(wanted, self._pass_block(wanted))
        pass_ms = self.costs.pass_ms(plan.shared, wanted, plan.depth)
        promise = now.promise
        if promise is not None:
            promise -= pass_ms * plan.worth / plan.shared
        asked = [
            0 if len(draft) and self._beats(draft, block, promise) else min(block, wanted)
            for block, draft in zip(blocks, quick, strict=True)
        ]
        if now.pass_guard.probing:  # a few requests tell what the drafter is worth to all
            some = [i for i, n in enumerate(asked) if n][:WATCHED]
            asked = [n if i in some else 0 for i, n in enumerate(asked)]
        plan.passed, plan.asked = max(asked), len(asked) - asked.count(0)
        if plan.passed:
            plan.pass_ms = pass_ms if plan.asked == plan.shared else self.costs.pass_ms(plan.asked, wanted, plan.depth)
        return asked

    @property
    def _plain_is_due(self) -> bool:
        tokens, cost = self._now.past
        return self._now.since_plain >= PLAIN_EVERY and tokens < MARGINAL * cost

    def _beats(self, quick: Draft, block: int, promise: float | None) -> bool:
        """Whether a quick draft gains more than the pass does on average (`promise`, its cost taken off)."""
        gain = self._plan.gain(self._beliefs([quick])[0][0])
        beats = gain > 0 and (likely(quick, block) if promise is None else gain >= promise)
        if beats and not self.quick_guard.active:
            self.quick_guard.skipped()
            return False
        return beats

    def _judge_by_what_is_known(self, block: int) -> None:
        """Before the first pass for so many requests: what earlier runs of this drafter saw, or the drafts of this one, may say
        that it pays here, or that it cannot."""
        now, plan = self._now, self._plan
        if now.judged:
            return
        now.judged = True
        if not self._asked_earlier:
            self._asked_earlier = True
            self._recent.extend(self._known)
        if len(self._recent) < ENOUGH:
            return
        survival = np.mean([_extended(a, block) for a in self._recent], axis=0).tolist()
        rate = self._expected_rate(survival)
        now.pass_guard = self._guard(
            trusted=rate >= TRUSTED, hopeful=rate >= HOPELESS, requests=now.pass_guard.requests
        )
        self._budget.lent = LENT_TRUSTED if rate >= TRUSTED else LENT
        if rate < HOPELESS:
            trial = self.costs.pass_ms(min(plan.shared, WATCHED), block, plan.depth)
            now.pass_guard.park(rate, "expected", trial=2 * trial / plan.plain)

    @property
    def _known(self) -> list[Numbers]:
        """How drafts of earlier runs survived on average, as often as it takes to be believed; [] if that is unknown."""
        known = next((b.survival for source, b in self.beliefs.items() if source != "lookup" and b.survival), ())
        return [known] * ENOUGH if known else []

    def _expected_rate(self, survival: Numbers) -> float:
        """Speed over plain decoding if drafts of every request survive as they did on average, at the best block."""
        plan = self._plan
        longest = min(len(survival), (len(plan.verify) - 1) // plan.shared)
        ms = plan.steady_ms(plan.shared * longest)
        best, tokens = 0.0, 1.0
        for b in range(1, longest + 1):
            tokens += survival[b - 1]
            best = max(best, tokens / (ms[plan.shared * b] + self.costs.pass_ms(plan.shared, b, plan.depth)))
        return best * plan.plain

    def _pass_block(self, limit: int) -> int:
        """The block whose tokens pay for what drafting them costs, over the drafts of the recent past."""
        block, left = self._now.block
        if left > 0:
            self._now.block = (block, left - 1)
            return block
        best, plan = limit, self._plan
        if len(self._recent) >= ENOUGH and self.costs.draft is not None:
            extra = (np.asarray(plan.verify[1 : limit + 1]) - plan.alone) * plan.worth
            gains = np.stack([_extended(a, limit) for a in self._recent]).cumsum(axis=1) - extra
            best_upto = np.maximum.accumulate(np.maximum(gains, 0.0), axis=1).mean(axis=0)
            costs = [
                self.costs.pass_ms(plan.shared, b + 1, plan.depth) * plan.worth / plan.shared for b in range(limit)
            ]
            best = int((best_upto - costs).argmax()) + 1
        self._now.block = (best, REVIEW if len(self._recent) >= ENOUGH else ENOUGH)
        return best

    # -- how much to verify --------------------------------------------------------------------------------------------

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        plan = self._plan
        if not (plan.passed or any(map(len, drafts))):
            plan.survival, self._watched = [NOTHING] * len(drafts), ()
            return [0] * len(drafts)
        plan.survival, plan.logits = self._beliefs(drafts)
        self._begin_trial(drafts)
        lengths, promised = self._lengths(drafts, self._offered(plan.survival))
        plan.verified = sum(lengths)
        plan.expected += promised
        return lengths

    def _lengths(self, drafts: Sequence[Draft], offered: Sequence[Numbers]) -> tuple[list[int], float]:
        """Tokens to verify of each draft, of which `offered` may be, and the accepted tokens a request that they promise."""
        plan, size = self._plan, sum(map(len, offered))
        if not size:
            return [0] * len(drafts), 0.0
        sampled = any(d.probs is not None for d in drafts)
        ms = self._smoothed() if sampled else plan.round_ms(size)
        tokens, cost = self._now.past
        carry = (tokens * plan.shared, min(cost, tokens) * plan.plain)
        cap = self._room if self.cap is None else min(self._room, self.cap - plan.shared)
        lengths = admit(offered, ms, early_stop=sampled, carry=carry, cap=cap)
        promised = 0.0
        for a, n in zip(offered, lengths, strict=True):
            if n:
                promised += sum(a[:n])
        promised /= plan.shared
        # For sampled drafts a look at all that was admitted would anticipate.
        if sampled or not promised or (1.0 + promised) * ms[0] > WORTH * ms[sum(lengths)]:
            return lengths, promised
        return [0] * len(drafts), 0.0

    def _begin_trial(self, drafts: Sequence[Draft]) -> None:
        """While it is to be found out whether the drafter pays, its drafts are not verified but watched: the next rounds'
        plain tokens tell what verifying would have brought, and a wrong guess has cost the drafter's pass only."""
        plan = self._plan
        self._watched = ()
        if not plan.passed or not self.pass_guard.probing or any(d.probs is not None for d in drafts):
            return
        self._watched = [i for i, d in enumerate(drafts) if len(d) and d.source not in OWN_HISTORY]
        if not self._watched:  # the pass brought nothing: there is nothing to wait for
            return
        survival = [a if i in self._watched else NOTHING for i, a in enumerate(plan.survival)]
        lengths, promised = self._lengths(drafts, survival)
        # What a pass for all would have brought and cost, from the few that are watched.
        scale = plan.shared / len(self._watched)
        size = min(round(sum(lengths) * scale), len(plan.verify) - 1)
        extra = (plan.verify[size] - plan.alone) / plan.plain
        self._trial = Trial(
            self._watched,
            survival,
            plan.logits,
            lengths,
            1.0 + scale * promised,
            1.0 + extra + self.costs.pass_ms(plan.shared, plan.passed, plan.depth) / plan.plain,
            extra,
            self._now,
        )

    def watched(self) -> Sequence[int]:
        return self._watched

    def seen(self, outcomes: Sequence[Outcome]) -> None:
        """A trial is over: judge it as if it had been verified."""
        trial, self._trial = self._trial, None
        if trial is None:
            return
        brought = 0.0
        judged = []
        for i, outcome in zip(trial.watched, outcomes, strict=True):
            length, x = trial.lengths[i], trial.logits[i]
            if outcome.judged:
                judged.append((outcome, x))
            # An answer that ended early left positions unjudged: they count as they were expected.
            unknown = outcome.kept == outcome.judged < length
            brought += sum(trial.survival[i][:length]) if unknown else min(outcome.kept, length)
        self._learn(judged)
        survival = [trial.survival[i] for i in trial.watched]
        self._count_pass(trial.regime, [o.draft for o in outcomes], survival, trial.expected, trial.extra)
        trial.regime.pass_guard.observe(trial.expected, 1.0 + brought / len(outcomes), trial.cost, spent=trial.spent)

    def _beliefs(self, drafts: Sequence[Draft]) -> tuple[list[Numbers], list[Numbers]]:
        """(survivals, logits), [k] of each draft."""
        if len(drafts) == 1 and len(drafts[0]):
            return self._belief(drafts[0].source).of(drafts)
        survival, logits = [NOTHING] * len(drafts), [NOTHING] * len(drafts)
        for source in {d.source for d in drafts if len(d)}:
            mine = [i for i, d in enumerate(drafts) if len(d) and d.source == source]
            found = self._belief(source).of([drafts[i] for i in mine])
            for i, a, x in zip(mine, *found, strict=True):
                survival[i], logits[i] = a, x
        return survival, logits

    def _belief(self, source: str) -> Belief:
        if source not in self.beliefs:
            self.beliefs[source] = Belief(learns=source not in OWN_HISTORY)
        return self.beliefs[source]

    def _offered(self, survival: Sequence[Numbers]) -> Sequence[Numbers]:
        """Survivals of what may be verified: little in a trial, nothing of quick drafts while those are parked."""
        if self._watched:
            survival = [NOTHING if i in self._watched else a for i, a in enumerate(survival)]
        elif self._plan.passed:
            # A trial is to find out what the drafter is worth, not to rely on what it says.
            return [a[:TRIAL] for a in survival] if self.pass_guard.probing else survival
        if self._budget.spent:
            survival = [a if len(a) and self._plan.gain(a) >= SURE_GAIN else NOTHING for a in survival]
        if self.quick_guard.active:
            return survival
        if any(self._plan.gain(a) > 0 for a in survival if len(a)):
            self.quick_guard.skipped()
        return [NOTHING for _ in survival]

    def _smoothed(self) -> list[float]:
        """The convex curve below the costs of a round, kept for some: they change slowly, and one over many requests is long.

        Over all that could have been drafted: how much was is the drafter's knowledge, not the past's.
        """
        plan, size = self._plan, len(self._plan.verify)
        repeated = plan.repeated if plan.switch else 0
        kept = self._smooth.get(repeated)
        self._smooth_left -= 1
        if kept is None or len(kept) != size or self._smooth_left <= 0:
            if self._smooth_left <= 0:
                self._smooth.clear()
                self._smooth_left = REVIEW
            kept = self._smooth[repeated] = convex_minorant(plan.round_ms(size - 1))
        return kept

    # -- what came of it -----------------------------------------------------------------------------------------------

    def observe(self, outcomes: Sequence[Outcome], times: Times) -> None:
        plan, costs, shared = self._plan, self.costs, len(outcomes)
        width = shared + plan.verified
        costs.observe_verify(shared, width, plan.depth, times.verify, switched=width != self._width)
        self._width = width if times.verify else 0  # without a time it had parts of prompts in it
        if plan.passed:
            costs.observe_pass(plan.asked, times.own, times.inject)
            costs.observe_draft(plan.asked, plan.passed, plan.depth, times.draft)
        else:
            costs.observe_overhead(times.own)
        if not (plan.passed or plan.verified):
            cost = 1.0 + plan.extra_ms / plan.plain
            self._now.count(1.0, cost, verified=False)
            self._budget.observe(1.0, cost)
        else:
            self._count_round(outcomes, times)
        if plan.logits:
            pairs = list(zip(outcomes, plan.logits, strict=True))
            self._learn([pair for i, pair in enumerate(pairs) if i not in self._watched] if self._watched else pairs)
        if not plan.passed or self._watched:
            self._skip_pass()
        self._parked = None if plan.verified or (plan.passed and not self._watched) else self._why_parked()

    def _count_round(self, outcomes: Sequence[Outcome], times: Times) -> None:
        """What a round with a pass of the drafter, or with draft tokens to verify, brought and cost."""
        plan, now = self._plan, self._now
        extra = plan.extra_ms / plan.plain
        cost = 1.0 + extra + plan.pass_ms / plan.plain
        brought = 1.0 + sum([o.accepted for o in outcomes]) / len(outcomes)
        now.count(brought, cost, verified=plan.verified > 0)
        if self._watched and self._trial is not None:
            # What it really took, with the features that waited.
            self._trial.spent = (times.draft + times.inject) / plan.plain
            cost = 1.0 + extra + self._trial.spent
        self._budget.observe(brought, cost)
        if plan.passed and not self._watched:
            self._count_pass(now, [o.draft for o in outcomes], plan.survival, plan.expected, extra)
            self.pass_guard.observe(plan.expected, brought, cost)
        elif plan.verified:
            self.quick_guard.observe(plan.expected, brought, cost)

    def _count_pass(
        self, regime: Regime, drafts: Sequence[Draft], survival: Sequence[Numbers], expected: float, extra: float
    ) -> None:
        """Remember what a pass was worth: `expected` tokens a request, for `extra` plain tokens of verifying."""
        plan = self._plan
        gain = expected - 1.0 - extra * plan.worth * plan.plain / plan.shared
        before = regime.promise
        regime.promise = gain if before is None else before + 0.1 * (gain - before)
        for draft, a in zip(drafts, survival, strict=True):
            if len(a):
                self._pass_sources.add(draft.source)
                self._recent.append(a)

    def _skip_pass(self) -> None:
        parked = not self.pass_guard.active
        self.pass_guard.skipped()
        if parked and self.pass_guard.active:  # a probe is due: text may have changed since the drafter was last seen
            self._fade(AFTER_PARKING)

    def _fade(self, share: float) -> None:
        for source in self._pass_sources:
            self._belief(source).platt.fade(share)

    def _learn(self, judged: Iterable[tuple[Outcome, Numbers]]) -> None:
        """Outcomes with the logits they were judged by."""
        found: dict[str, list[tuple[Outcome, Numbers]]] = {}
        for outcome, x in judged:
            if outcome.judged and len(x):
                found.setdefault(outcome.draft.source, []).append((outcome, x))
        for source, rows in found.items():
            self._belief(source).learn(rows)

    def _why_parked(self) -> str | None:
        guard = self.pass_guard
        watching = guard.probing and (self._trial is not None or bool(self._watched))
        if guard.active and not watching:
            if self._budget.spent:
                return f"{-self._budget.gained:.1f} tokens behind plain decoding on this answer"
            guard = self.quick_guard
            if guard.active:
                return None
        return f"{guard.reason or UNKNOWN} on this machine" + (f" with {self.label}" if self.label else "")

    @property
    def parked(self) -> str | None:
        return self._parked


def _extended(survival: Numbers, size: int) -> list[float]:
    """Survivals [size] of a draft, of a shorter one going on as they went on average."""
    ratio = survival[-1] ** (1.0 / len(survival))
    return [*survival[:size], *[survival[-1] * ratio**k for k in range(1, size - len(survival) + 1)]]
