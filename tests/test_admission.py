"""Which tokens are verified: against brute force over every choice of prefixes, and what must always hold."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_cli.engine.admission import admit, convex_minorant
from dspark_cli.engine.costs import CostModel, Curve

Rows = list[list[float]]
conditionals = st.lists(st.lists(st.floats(0.01, 0.99), min_size=0, max_size=4), min_size=1, max_size=3)
jagged = st.lists(st.floats(0.5, 20.0), min_size=13, max_size=13)
carries = st.one_of(st.just((0.0, 0.0)), st.tuples(st.floats(0.0, 40.0), st.floats(0.0, 200.0)))


def survivals(rows: Rows) -> list[np.ndarray]:
    return [np.cumprod(np.asarray(row)) for row in rows]


def rate(
    survival: list[np.ndarray], lengths: tuple[int, ...] | list[int], ms: np.ndarray, carry: tuple[float, float]
) -> float:
    tokens = len(survival) + sum(float(a[:n].sum()) for a, n in zip(survival, lengths, strict=True))
    return (tokens + carry[0]) / (float(ms[sum(lengths)]) + carry[1])


def brute_force(survival: list[np.ndarray], ms: np.ndarray, carry: tuple[float, float]) -> float:
    """The best rate over all choices of one prefix a request."""
    choices = itertools.product(*(range(len(a) + 1) for a in survival))
    return max(rate(survival, lengths, ms, carry) for lengths in choices)


@settings(max_examples=300, deadline=None)
@given(conditionals, jagged, carries)
def test_argmax_equals_brute_force_on_any_cost_curve(
    rows: Rows, costs: list[float], carry: tuple[float, float]
) -> None:
    survival, ms = survivals(rows), np.asarray(costs)
    lengths = admit(survival, ms, early_stop=False, carry=carry)
    assert all(0 <= n <= len(a) for n, a in zip(lengths, survival, strict=True))
    assert rate(survival, lengths, ms, carry) == pytest.approx(brute_force(survival, ms, carry), rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(conditionals, jagged, carries)
def test_early_stop_equals_brute_force_on_the_smoothed_curve(
    rows: Rows, costs: list[float], carry: tuple[float, float]
) -> None:
    survival, ms = survivals(rows), convex_minorant(np.asarray(costs))
    lengths = admit(survival, ms, early_stop=True, carry=carry)
    assert rate(survival, lengths, ms, carry) == pytest.approx(brute_force(survival, ms, carry), rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(conditionals, jagged, st.data())
def test_early_stop_decides_on_a_position_without_looking_past_it(
    rows: Rows, costs: list[float], data: st.DataObject
) -> None:
    """Change anything behind the first position that was refused: the lengths stay as they are."""
    ms = convex_minorant(np.asarray(costs))
    lengths = admit(survivals(rows), ms, early_stop=True)
    changed = [
        [c if k <= n else data.draw(st.floats(0.01, 0.99)) for k, c in enumerate(row)]
        for row, n in zip(rows, lengths, strict=True)
    ]
    assert admit(survivals(changed), ms, early_stop=True) == lengths


def test_the_unconstrained_search_does_look_past_it() -> None:
    """Why it is only for deterministic drafts: on a jagged curve the fate of token 1 depends on the confidence of token 2."""
    ms = np.asarray([10.0, 16.0, 16.0])
    assert admit([np.asarray([0.5, 0.45])], ms, early_stop=False) == [2]
    assert admit([np.asarray([0.5, 0.05])], ms, early_stop=False) == [0]


@settings(max_examples=200, deadline=None)
@given(conditionals, st.floats(1.0, 20.0), st.booleans())
def test_nothing_is_admitted_when_nothing_pays(rows: Rows, first: float, early_stop: bool) -> None:
    """A token that costs what a round of plain decoding costs a sequence cannot pay: it comes with less than certainty."""
    ms = first * (1.0 + np.arange(13) / len(rows))
    assert admit(survivals(rows), ms, early_stop=early_stop) == [0] * len(rows)


@settings(max_examples=200, deadline=None)
@given(conditionals, jagged, st.booleans(), st.integers(0, 6))
def test_never_beyond_the_cap(rows: Rows, costs: list[float], early_stop: bool, cap: int) -> None:
    lengths = admit(survivals(rows), np.asarray(costs), early_stop=early_stop, cap=cap)
    assert sum(lengths) <= cap
    assert all(n <= len(row) for n, row in zip(lengths, rows, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4), min_size=2, max_size=3),
    jagged,
    st.booleans(),
    st.data(),
)
def test_the_order_of_requests_does_not_matter(
    rows: Rows, costs: list[float], early_stop: bool, data: st.DataObject
) -> None:
    survival = survivals(rows)
    values = [float(v) for a in survival for v in a]
    order = data.draw(st.permutations(range(len(rows))))
    ms = convex_minorant(np.asarray(costs)) if early_stop else np.asarray(costs)
    lengths = admit(survival, ms, early_stop=early_stop)
    permuted = admit([survival[i] for i in order], ms, early_stop=early_stop)
    assert rate([survival[i] for i in order], permuted, ms, (0, 0)) == pytest.approx(
        rate(survival, lengths, ms, (0, 0))
    )
    if len(set(values)) == len(values):  # equal survivals are interchangeable
        assert permuted == [lengths[i] for i in order]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0.1, 50.0), min_size=1, max_size=40))
def test_the_minorant_is_convex_below_and_touches_both_ends(costs: list[float]) -> None:
    ms = np.asarray(costs)
    low = convex_minorant(ms)
    assert (low <= ms + 1e-9).all()
    assert low[0] == ms[0]
    assert low[-1] == ms[-1]
    assert (np.diff(low, 2) >= -1e-6).all()
    # The greatest one: between two points where it touches the curve it is straight.
    touches = np.flatnonzero(np.isclose(low, ms, rtol=1e-12))
    for a, b in itertools.pairwise(touches):
        assert np.allclose(low[a : b + 1], np.linspace(low[a], low[b], b - a + 1))


def test_a_convex_curve_is_its_own_minorant() -> None:
    ms = 10.0 + np.arange(9) ** 1.5
    assert np.allclose(convex_minorant(ms), ms)


class TestCosts:
    def test_jags_are_kept_and_gaps_filled(self) -> None:
        curve = Curve({1: 10.0, 2: 16.0, 4: 15.0, 8: 35.0})
        assert [curve.at(n) for n in (1, 2, 3, 4, 6, 8)] == [10.0, 16.0, 15.5, 15.0, 25.0, 35.0]
        assert curve.at(15) == pytest.approx(35.0 + 7 * 25.0 / 7)
        assert curve.at(4) == 15.0

    @pytest.mark.parametrize("known", [{}, {0: 1.0}, {1: float("nan")}, {1: -1.0}])
    def test_nonsense_is_no_curve(self, known: dict[int, float]) -> None:
        with pytest.raises(ValueError, match="cost curve"):
            Curve(known)

    def test_depth_costs(self) -> None:
        costs = CostModel(Curve({1: 10.0, 5: 20.0}), depth=32, slope=(0.01, 0.001))
        assert costs.verify_ms(1, 32, 5)[5] == 20.0
        assert costs.verify_ms(1, 132, 5)[5] == pytest.approx(20.0 + 100 * 0.015)
        assert costs.verify_ms(2, 132, 5)[5] == pytest.approx(20.0 + 200 * 0.015)
        costs.crowded = False  # five tokens of two sequences, each over the 100 more of its own
        assert costs.verify_ms(2, 132, 5)[5] == pytest.approx(20.0 + 200 * 0.01 + 100 * 0.005)

    def test_rounds_refine_the_profile(self) -> None:
        """Width 3 is twice as dear as the profile says, everything else as it says: the model comes to know."""
        true = {1: 10.0, 2: 14.0, 3: 36.0, 4: 22.0, 5: 26.0}
        costs = CostModel(Curve({**true, 3: 18.0}))
        random = np.random.default_rng(0)
        for _ in range(600):
            width = int(random.integers(1, 6))
            costs.observe_verify(1, width, 0, true[width] * random.normal(1.0, 0.05))
        curve = costs.verify_ms(1, 0, 5)
        for width, ms in true.items():
            assert curve[width] == pytest.approx(ms, rel=0.12)
        assert costs.disagrees

    def test_a_slower_machine_is_no_disagreement(self) -> None:
        true = {1: 10.0, 2: 14.0, 3: 18.0, 4: 22.0}
        costs = CostModel(Curve(true))
        random = np.random.default_rng(0)
        for _ in range(600):
            width = int(random.integers(1, 5))
            costs.observe_verify(1, width, 0, 1.7 * true[width] * random.normal(1.0, 0.05))
        assert costs.verify_ms(1, 0, 4)[3] == pytest.approx(1.7 * 18.0, rel=0.15)
        assert not costs.disagrees

    def test_a_slow_machine_met_at_one_width_only_slows_them_all(self) -> None:
        """A neighbour arrives while only plain rounds run: drafts must not look cheap against them."""
        costs = CostModel(Curve({1: 10.0, 2: 14.0, 4: 22.0}))
        for _ in range(200):
            costs.observe_verify(1, 1, 0, 20.0)
        curve = costs.verify_ms(1, 0, 4)
        assert curve[1] == pytest.approx(20.0, rel=0.05)
        assert 1.8 < curve[4] / curve[1] < 2.4

    @pytest.mark.parametrize("ms", [0.0, -5.0, float("nan"), float("inf")])
    def test_a_broken_clock_changes_nothing(self, ms: float) -> None:
        costs = CostModel(Curve({1: 10.0, 2: 14.0}), draft=Curve({3: 2.0}))
        costs.observe_verify(1, 1, 0, ms)
        costs.observe_draft(1, 3, 0.0, ms)
        costs.observe_overhead(-1.0)
        costs.observe_pass(1, float("nan"), ms)
        assert costs.verify_ms(1, 0, 2) == [0.0, 10.0, 14.0]
        assert costs.pass_ms(1, 3) == 2.0
        assert costs.own_ms == 0.3

    def test_an_outlier_moves_little(self) -> None:
        costs = CostModel(Curve({1: 10.0, 2: 14.0}))
        costs.observe_verify(1, 1, 0, 10_000.0)
        assert costs.verify_ms(1, 0, 1)[1] < 13.0

    def test_without_a_profile_the_first_pass_sets_the_scale(self) -> None:
        costs = CostModel.unmeasured()
        costs.observe_verify(1, 1, 0, 400.0)
        assert costs.verify_ms(1, 0, 2)[1] == pytest.approx(400.0)
        assert costs.verify_ms(1, 0, 2)[2] > 400.0

    def test_round_trip(self) -> None:
        verify, draft, eight = Curve({1: 10.0, 3: 14.5}), Curve({4: 2.0}), Curve({4: 9.0})
        costs = CostModel(
            verify, 64, (0.1, 0.01), False, draft, (8, eight), (0.2, 0.02), Curve({1: 0.4, 8: 1.2}), 0.2, 0.25
        )
        raw = costs.as_dict()
        assert CostModel.from_dict(raw).as_dict() == raw
        assert CostModel.from_dict(json.loads(json.dumps(raw))).pass_ms(5, 4, 100) == costs.pass_ms(5, 4, 100)

    def test_drafting_for_several_sequences_costs_what_was_measured_of_several(self) -> None:
        costs = CostModel(
            Curve({1: 10.0}),
            depth=32,
            draft=Curve({1: 2.0, 4: 4.0}),
            several=(8, Curve({1: 9.0, 4: 32.0})),
            draft_slope=(0.001, 0.002),
            inject=Curve({1: 0.5, 8: 1.9}),
        )
        assert costs.pass_ms(1, 4) == pytest.approx(4.0 + 0.5)
        assert costs.pass_ms(8, 4) == pytest.approx(32.0 + 1.9)
        assert costs.pass_ms(2, 4) == pytest.approx(8.0 + 0.7)  # a seventh of the way from one to eight
        assert costs.pass_ms(15, 1) == pytest.approx(16.0 + 3.3)  # and on
        assert costs.pass_ms(2, 4, 132) == pytest.approx(8.7 + 2 * 100 * (0.001 + 0.002 * 8))

    def test_what_a_pass_for_several_cost_is_learned_for_that_many(self) -> None:
        costs = CostModel(Curve({1: 10.0}), draft=Curve({4: 4.0}), several=(8, Curve({4: 20.0})), own_ms=0.0)
        costs.pass_own_ms = 0.0
        for _ in range(300):
            costs.observe_draft(8, 4, 0.0, 30.0)
            costs.observe_pass(8, 0.0, 2.0)
        assert costs.pass_ms(8, 4) == pytest.approx(32.0, rel=0.05)
        assert costs.pass_ms(1, 4) == pytest.approx(6.0)

    def test_features_that_waited_long_say_little_of_the_next_round(self) -> None:
        costs = CostModel(Curve({1: 10.0}), draft=Curve({4: 4.0}), inject=Curve({1: 0.5}))
        for _ in range(40):
            costs.observe_pass(1, 0.3, 0.5)
        costs.observe_pass(1, 0.3, 50.0)
        assert costs.pass_ms(1, 4) == pytest.approx(4.5, rel=0.02)

    @pytest.mark.parametrize(
        "change",
        [
            {"verify": {"1": -3.0}},
            {"verify": None},
            {"slope": [1]},
            {"slope": [0.0, -0.1]},
            {"own_ms": "x"},
            {"depth": None},
            {"several": {"sequences": 1, "ms": {}}},
            {"inject": {"1": -1}},
        ],
    )
    def test_a_file_that_is_no_profile(self, change: dict[str, object]) -> None:
        raw = {**CostModel(Curve({1: 10.0})).as_dict(), **change}
        with pytest.raises((ValueError, TypeError, KeyError)):
            CostModel.from_dict(raw)
