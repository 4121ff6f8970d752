"""The product: speculation changes speed, never the output's law.

A random target over a small vocabulary has a law that can be written down: the probability of every answer of length 3.
Each drafter and accept rule must reproduce it. Deliberately wrong rules must fail the same test.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from dspark_cli.backends.base import Draft, Drafter, DraftRequest
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.backends.standalone import StandaloneDrafter
from dspark_cli.engine import sampling
from dspark_cli.engine.admission import admit
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import Belief
from dspark_cli.engine.calibration import OnlinePlatt
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.guard import Guard
from dspark_cli.engine.rounds import Request, SamplingOptions, Times
from dspark_cli.engine.schedule import Fixed, Off, Outcome, Schedule, Threshold
from fakes import TableDrafter, TableTarget
from tests_support import whole_row

N_VOCAB, LENGTH, DRAWS = 4, 4, 5_000
PROMPT = [0, 1, 2, 0, 1]
DRAFTERS: dict[str, Callable[[TableTarget], Drafter]] = {
    "table": lambda target: TableDrafter(target),
    "small": lambda target: StandaloneDrafter(TableTarget(N_VOCAB, seed=7), n_vocab=N_VOCAB, block_size=3),
    "lookup": lambda target: LookupDrafter(block_size=3),
}
SETTINGS = {
    "plain-law": SamplingOptions(temperature=1.0),
    "cool-top-k": SamplingOptions(temperature=0.7, top_k=3),
    "top-p": SamplingOptions(temperature=1.0, top_p=0.8),
    "min-p-penalty": SamplingOptions(temperature=1.2, min_p=0.1, repeat_penalty=1.3),
}


def exact_law(target: TableTarget, options: SamplingOptions) -> dict[tuple[int, ...], float]:
    """P(answer) of every answer of LENGTH tokens, by enumeration."""
    law = {}
    for answer in itertools.product(range(N_VOCAB), repeat=LENGTH):
        text, probability = list(PROMPT), 1.0
        for token in answer:
            probability *= float(sampling.probabilities(target.row(text), options, text)[token])
            text.append(token)
        law[answer] = probability
    return law


def drawn(
    options: SamplingOptions, make: Callable[[TableTarget], Drafter] | None, schedule: Schedule, draws: int = DRAWS
) -> Counter[tuple[int, ...]]:
    """Answers of `draws` requests that differ in their seed only."""
    target = TableTarget(N_VOCAB)
    # A clock that stands still: no policy may depend on how fast this test runs.
    engine = Engine(target, make(target) if make else None, schedule, clock=lambda: 0.0)
    requests = [
        Request(PROMPT, LENGTH, SamplingOptions(**{**vars(options), "seed": 1000 + i}), id=i) for i in range(draws)
    ]
    answers: dict[int, list[int]] = {}
    for item in engine.run(requests):
        answers.setdefault(item.request, []).extend(item.tokens)
    assert len(answers) == draws
    return Counter(tuple(a) for a in answers.values())


def excess(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square statistic in standard deviations above its mean; cells under 5 expected draws are pooled."""
    total = sum(counts.values())
    assert all(law[a] > 0 for a in counts), "an answer the target cannot give"
    statistic, cells, pooled_expected, pooled_seen = 0.0, 0, 0.0, 0
    for answer, probability in law.items():
        expected, seen = probability * total, counts.get(answer, 0)
        if expected < 5:
            pooled_expected, pooled_seen = pooled_expected + expected, pooled_seen + seen
        else:
            statistic, cells = statistic + (seen - expected) ** 2 / expected, cells + 1
    if pooled_expected >= 1:
        statistic, cells = statistic + (pooled_seen - pooled_expected) ** 2 / pooled_expected, cells + 1
    freedom = cells - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


LIMIT = 4.5  # standard deviations of chi-square; the wrong rules below exceed it several times over


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("accept", ["exact", "residual"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_output_has_the_targets_law(drafter: str, accept: str, setting: str) -> None:
    options = SamplingOptions(**{**vars(SETTINGS[setting]), "accept": accept})
    counts = drawn(options, DRAFTERS[drafter], Fixed(3))
    assert excess(counts, exact_law(TableTarget(N_VOCAB), options)) < LIMIT


@pytest.mark.parametrize("accept", ["exact", "residual"])
def test_threshold_keeps_the_law(accept: str) -> None:
    options = SamplingOptions(temperature=1.0, accept=accept)  # type: ignore[arg-type]
    counts = drawn(options, DRAFTERS["table"], Threshold(0.45))
    assert excess(counts, exact_law(TableTarget(N_VOCAB), options)) < LIMIT


#: T(2) is so dear that one draft token alone rarely pays, and T(3), T(4) add almost nothing
JAGGED = {1: 10.0, 2: 17.5, 3: 17.6, 4: 17.7}


def jagged_auto(kind: type[AutoSchedule] = AutoSchedule, *, learns: bool = True) -> AutoSchedule:
    costs = CostModel(Curve(JAGGED), draft=Curve({3: 0.1}), own_ms=0.0, pass_own_ms=0.0)
    if learns:
        return kind(costs)
    # Keeps believing the drafter, and never parks.
    return kind(costs, beliefs={"table": Belief(platt=Credulous())}, guard=partial(Guard, patience=(1e9, 1e9)))


class Credulous(OnlinePlatt):
    def update(self, logits: Sequence[float], happened: Sequence[float]) -> None:
        pass


class TellingDrafter(TableDrafter):
    """Its confidence in a token swings with the token before it: what x_1 is decides what c_2 says."""

    def _propose(self, request: DraftRequest) -> Draft:
        draft = super()._propose(request)
        before = draft.tokens[:-1].tolist()
        confidence = [0.6, *(0.95 if token % 2 else 0.05 for token in before)][: len(draft)]
        return replace(draft, confidence=np.asarray(confidence, dtype=np.float32))


class Anticipating(AutoSchedule):
    """Wrong on purpose: the best length over the jagged curve, though drafts are sampled.

    Whether token 1 is verified then depends on the confidence of token 2, which depends on what token 1 is.
    """

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        super().choose(drafts)
        lengths = admit(self._plan.survival, self._plan.round_ms(sum(map(len, drafts))), early_stop=False)
        self._plan.verified = sum(lengths)
        return lengths


@pytest.mark.parametrize("accept", ["exact", "residual"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_auto_keeps_the_law(drafter: str, accept: str) -> None:
    """Learning, parking and probing on the way."""
    options = SamplingOptions(temperature=1.0, accept=accept)  # type: ignore[arg-type]
    counts = drawn(options, DRAFTERS[drafter], jagged_auto())
    assert excess(counts, exact_law(TableTarget(N_VOCAB), options)) < LIMIT


def test_auto_keeps_the_law_where_the_search_with_hindsight_breaks_it() -> None:
    """The paper's appendix A, as a scheduler would commit it: same costs, same drafts, two searches, each with two lengths."""
    options = SamplingOptions(temperature=1.0, accept="residual")
    law = exact_law(TableTarget(N_VOCAB), options)
    for kind, lossless in ((AutoSchedule, True), (Anticipating, False)):
        lengths = Counter[int]()
        schedule = jagged_auto(kind, learns=False)
        counts = drawn(options, TellingDrafter, Counted(schedule, lengths))
        assert sum(n > DRAWS / 10 for n in lengths.values()) >= 2, lengths
        assert (excess(counts, law) < LIMIT) if lossless else (excess(counts, law) > 2 * LIMIT)


class Counted(Schedule):
    """Another schedule, with a count of the lengths it chose."""

    def __init__(self, inner: Schedule, lengths: Counter[int]) -> None:
        self.name, self._inner, self._lengths = inner.name, inner, lengths

    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        return self._inner.block(limits, depth)

    def passes(self, blocks: Sequence[int], quick: Sequence[Draft]) -> list[int]:
        return self._inner.passes(blocks, quick)

    def observe(self, outcomes: Sequence[Outcome], times: Times) -> None:
        self._inner.observe(outcomes, times)

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        chosen = self._inner.choose(drafts)
        self._lengths.update(n for n, draft in zip(chosen, drafts, strict=True) if len(draft))
        return chosen


def test_exact_accept_keeps_the_law_even_where_a_length_hangs_on_the_drawn_token() -> None:
    """The drafter races by the target's own numbers and its confidence looks at the winner: what ends the rule "residual"
    (below) cannot touch a token that is found whatever was drafted."""
    options = SamplingOptions(temperature=1.0)
    counts = drawn(options, lambda t: TableDrafter(t, peek=True), Threshold(0.3))
    assert excess(counts, exact_law(TableTarget(N_VOCAB), options)) < LIMIT


def test_exact_accept_gives_the_text_of_plain_decoding_with_the_same_seed() -> None:
    options = SamplingOptions(temperature=1.0)
    plain = drawn(options, None, Off(), draws=300)
    for make in DRAFTERS.values():
        assert drawn(options, make, Fixed(3), draws=300) == plain


class TestWrongRulesFail:
    """The same test, with rules that are wrong on purpose: it must notice each of them."""

    OPTIONS = SamplingOptions(temperature=1.0, accept="residual")

    def statistic(self, schedule: Schedule | None = None, peek: bool = False) -> float:
        counts = drawn(self.OPTIONS, lambda t: TableDrafter(t, peek=peek), schedule or Fixed(3))
        return excess(counts, exact_law(TableTarget(N_VOCAB), self.OPTIONS))

    def test_no_residual_correction(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampling, "residual", lambda target_probs, draft_probs: target_probs)
        assert self.statistic() > 2 * LIMIT

    def test_accepting_without_the_draft_probability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampling, "accept_probability", lambda target_probs, draft_probs, x: float(target_probs[x]))
        assert self.statistic() > 2 * LIMIT

    def test_judging_by_the_row_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = sampling.Sampler.verify
        monkeypatch.setattr(
            sampling.Sampler, "verify", lambda self, logits, draft: original(self, np.roll(logits, 1, axis=0), draft)
        )
        assert self.statistic() > 2 * LIMIT

    def test_a_confidence_that_looks_at_the_drawn_token(self) -> None:
        """The paper's appendix A: a length decided by x_k itself biases the output."""
        assert self.statistic(Threshold(0.3), peek=True) > 2 * LIMIT


def test_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of the published generator from the state 1234567."""
    found = sampling.uniforms(1234567, np.array([1, 2, 3])) * 2.0**52 - 0.5
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert found.astype(np.int64).tolist() == [n >> 12 for n in expected]


def test_a_race_follows_its_probabilities_also_of_rare_tokens() -> None:
    """Half of the mass lies in tokens that race as one."""
    probs = np.full(10_003, 0.5 / 10_000, dtype=np.float32)
    probs[[7, 5000, 10_002]] = [0.3, 0.15, 0.05]
    probs[100:200] = 0.0
    keys = np.random.default_rng(1).integers(0, 2**63, size=20_000).tolist()
    won = np.bincount([sampling.race(probs, key)[0] for key in keys], minlength=len(probs))
    assert not won[100:200].any()
    edges = [0, 7, 8, 100, 200, *range(800, 5000, 600), 5000, 5001, *range(5600, 10_002, 600), 10_002]
    parts = np.add.reduceat(won, edges).tolist()
    counts = Counter({(i,): n for i, n in enumerate(parts) if n})
    law = {(i,): float(p) for i, p in enumerate(np.add.reduceat(probs / probs.sum(), edges))}
    assert excess(counts, law) < LIMIT


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_nearly_equal_logits_win_the_same_race(noise: float) -> None:
    """Texts of a seed part by what the logits differ, not by how wide the vocabulary is; the gap says which may."""
    random = np.random.default_rng(2)
    options, parted, by_sum, distance, races = SamplingOptions(temperature=1.0), 0, 0, 0.0, 400
    for key in random.integers(0, 2**63, size=races).tolist():
        row = random.normal(size=5000).astype(np.float32) * 2
        other = row + random.normal(size=5000).astype(np.float32) * noise
        p, q = sampling.probabilities(row, options), sampling.probabilities(other, options)
        (token, gap), (same, _) = sampling.race(p, key), sampling.race(q, key)
        parted += token != same
        # tokens near the border of those that race as one may change sides, which no gap foretells
        common = min(p[token] / p.max(), q[same] / q.max(), p[same] / p.max(), q[token] / q.max()) > 2 * sampling.RARE
        assert token == same or gap < 12 * noise or not common
        uniform = float(random.random())
        by_sum += sampling.draw(p, uniform) != sampling.draw(q, uniform)
        distance += 0.5 * float(np.abs(p - q).sum())
    bound = 2 * distance / races / (1 + distance / races)  # of the share that parts
    assert parted / races < bound + 3 * (bound / races) ** 0.5
    assert parted < 0.5 * by_sum


def test_drafts_that_race_by_the_targets_numbers_are_kept_more_often_than_best_tokens() -> None:
    options = SamplingOptions(temperature=1.0)

    class Best(TableDrafter):
        def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
            return super().propose([replace(r, choose=None) for r in requests])

    def share(kind: type[TableDrafter]) -> float:
        target = TableTarget(N_VOCAB)
        drafter = kind(target)
        drafter.table = target.table.mean(axis=0)  # the target's rows hang on one token more
        engine = Engine(target, drafter, Fixed(3), clock=lambda: 0.0)
        requests = [Request(PROMPT, 40, replace(options, seed=i), id=i) for i in range(50)]
        rounds = [item for item in engine.run(requests) if item.verified]
        return sum(item.accepted for item in rounds) / sum(min(item.accepted + 1, item.verified) for item in rounds)

    assert share(TableDrafter) > share(Best) + 0.1


def test_draft_rows_of_a_reduced_vocabulary_race_as_the_whole_ones() -> None:
    random = np.random.default_rng(4)
    ids = np.sort(random.choice(500, size=60, replace=False))
    for seed, options in enumerate(SETTINGS.values()):
        sampler = sampling.Sampler(replace(options, seed=seed), PROMPT)
        sampler.commit([sampler.first(random.normal(size=500).astype(np.float32))])
        for _ in range(40):
            row = random.normal(size=60).astype(np.float32) * 2
            token, probs = sampler.choose_draft(row, [3, 4], ids)
            assert (token, probs) == sampler.choose_draft(whole_row(row, ids, 500), [3, 4])
            assert token in ids
            assert probs is None


def test_draw_follows_its_probabilities() -> None:
    probs = np.array([0.0, 0.5, 0.0, 0.25, 0.25, 0.0], dtype=np.float32)
    uniforms = (np.arange(1000) + 0.5) / 1000
    counts = np.bincount([sampling.draw(probs, u) for u in uniforms], minlength=6)
    assert counts.tolist() == [0, 500, 0, 250, 250, 0]
    assert sampling.draw(probs, 0.0) == 1
    assert sampling.draw(probs, np.nextafter(1.0, 0.0)) == 4


def test_draw_over_a_real_vocabulary_width_follows_its_probabilities() -> None:
    """Two-level search: block borders, an odd tail, zero blocks; compared with one cumulative sum in float64."""
    random = np.random.default_rng(3)
    probs = random.random(49_155).astype(np.float32) ** 40
    probs[1000:3000] = 0.0
    probs[-3:] = [0.0, 0.2, 0.0]
    probs /= probs.sum()
    whole = np.cumsum(probs, dtype=np.float64)
    for uniform in [*random.random(3000), 0.0, 0.999999999, np.nextafter(1.0, 0.0)]:
        token = sampling.draw(probs, uniform)
        assert probs[token] > 0
        # float32 block sums: the borders of a token may move by a few ulp of the total
        assert whole[token] - probs[token] - 2e-6 <= uniform * whole[-1] <= whole[token] + 2e-6


@pytest.mark.parametrize("count", [1, 5, 40, 191, 192, 5000])
def test_top_k_keeps_the_k_largest(count: int) -> None:
    row = np.random.default_rng(count).normal(size=49_155).astype(np.float32)
    probs = sampling.probabilities(row, SamplingOptions(temperature=1.0, top_k=count))
    assert set(np.flatnonzero(probs)) == set(np.argsort(-row)[:count])


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    row = np.random.default_rng(1).normal(size=49_155).astype(np.float32) * 3
    law = np.exp(row.astype(np.float64) - row.max())
    law /= law.sum()
    order = np.argsort(-law)
    size = int(np.searchsorted(np.cumsum(law[order]), top_p)) + 1
    kept = np.flatnonzero(sampling.probabilities(row, SamplingOptions(temperature=1.0, top_p=top_p)))
    # float32 sums may move the border by a token or two of a thousand
    assert len(set(kept) ^ set(order[:size])) <= max(1, size // 500)
