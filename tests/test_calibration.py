"""Reliability figures, STS, online recalibration: against hand-made cases, references and known laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_cli.engine.calibration import (
    GRID,
    OnlinePlatt,
    PositionHistory,
    Recorded,
    Sts,
    auc,
    ece,
    fit_sts,
    logit,
    pooled,
    reliability,
    report,
    sigmoid,
)


def law(n: int, block: int, temperatures: list[float], seed: int = 0) -> Recorded:
    """Rounds of a drafter whose position k is calibrated at temperature temperatures[k], all of them verified."""
    random = np.random.default_rng(seed)
    raw = sigmoid(random.normal(0.8, 1.6, size=(n, block)))
    true = sigmoid(logit(raw) / np.asarray(temperatures))
    refused = random.random((n, block)) >= true
    accepted = np.where(refused.any(axis=1), refused.argmax(axis=1), block)
    return Recorded(raw, np.full(n, block), accepted)


def test_ece_by_hand() -> None:
    predicted = np.asarray([0.05, 0.05, 0.95, 0.95])
    assert ece(predicted, np.asarray([0, 0, 1, 1])) == pytest.approx(0.05)
    assert ece(predicted, np.asarray([1, 1, 0, 0])) == pytest.approx(0.95)
    assert ece(np.asarray([0.7] * 10), np.asarray([1] * 7 + [0] * 3)) == pytest.approx(0.0, abs=1e-12)
    assert ece(np.asarray([]), np.asarray([])) == 0.0
    assert reliability(np.asarray([0.05, 1.0, 0.99]), np.asarray([0, 1, 0])) == [(0.05, 0.0, 1), (0.995, 0.5, 2)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[float, bool]]) -> None:
    predicted, happened = np.asarray([p for p, _ in rows]), np.asarray([float(h) for _, h in rows])
    pairs = list(itertools.product(predicted[happened == 1], predicted[happened == 0]))
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else None
    assert auc(predicted, happened) == (None if expected is None else pytest.approx(expected))


class TestSts:
    def test_finds_the_temperatures_it_was_made_with(self) -> None:
        fitted = fit_sts(law(20_000, 4, [2.0, 1.0, 0.6, 3.0])).temperatures
        assert fitted == pytest.approx((2.0, 1.0, 0.6, 3.0), rel=0.25)

    def test_halves_ece_on_held_out_rounds(self) -> None:
        temperatures = [2.0, 2.5, 2.5, 3.0]
        sts = fit_sts(law(4000, 4, temperatures, seed=1))
        rows = report(law(4000, 4, temperatures, seed=2), sts)
        assert len(rows) == 4
        assert all(row["ece_after"] < row["ece_before"] / 2 for row in rows)
        assert all(row["auc"] > 0.6 for row in rows)

    def test_leaves_a_calibrated_head_alone(self) -> None:
        rounds = law(20_000, 3, [1.0, 1.0, 1.0])
        assert fit_sts(rounds).temperatures == pytest.approx((1, 1, 1), rel=0.15)

    def test_each_position_minimises_the_ece_of_the_product_with_earlier_ones_fixed(self) -> None:
        """The definition, checked position by position against every temperature of the grid."""
        rounds = law(600, 3, [2.0, 0.5, 1.5], seed=3)
        fitted = fit_sts(rounds).temperatures
        for k, t in enumerate(fitted):
            happened = (rounds.accepted > k).astype(float)

            def error(last: float, k: int = k, happened: np.ndarray = happened) -> float:
                scaled = Sts((*fitted[:k], last))(rounds.confidence[:, : k + 1])
                return ece(scaled.prod(axis=1), happened)

            assert error(t) <= min(error(float(other)) for other in GRID) + 1e-9

    def test_rounds_that_verified_less_count_where_they_verified(self) -> None:
        rounds = Recorded.of([((0.9, 0.8, 0.7), 1, 1), ((0.6,), 1, 0), ((0.5, 0.5), 2, 1)] * 40)
        assert rounds.confidence.shape == (120, 3)
        assert [int(rounds.at(k).sum()) for k in range(3)] == [120, 40, 0]
        assert rounds.survival() == pytest.approx([2 / 3, 0.0])
        assert len(fit_sts(rounds, at_least=50).temperatures) == 1
        predicted, happened = pooled(rounds, Sts())
        assert len(predicted) == len(happened) == 160

    def test_without_rounds(self) -> None:
        assert fit_sts(Recorded.of([])).temperatures == ()
        assert Sts()(np.asarray([0.3, 0.9])).tolist() == [0.3, 0.9]

    def test_positions_beyond_the_fit_use_the_last_temperature(self) -> None:
        assert Sts((2.0, 3.0)).upto(4).tolist() == [2.0, 3.0, 3.0, 3.0]


class TestOnline:
    def run(self, slope: float, offset: float, n: int, seed: int = 0) -> tuple[OnlinePlatt, np.ndarray, np.ndarray]:
        """A drafter whose truth is sigmoid(slope * logit + offset); rounds of three tokens."""
        random, platt = np.random.default_rng(seed), OnlinePlatt()
        for _ in range(n):
            x = random.normal(0.5, 1.5, size=3)
            platt.update(x.tolist(), (random.random(3) < sigmoid(slope * x + offset)).astype(float).tolist())
        x = random.normal(0.5, 1.5, size=2000)
        return platt, platt(x), sigmoid(slope * x + offset)

    @pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 0.0), (1.0, -2.0), (0.4, -1.5), (1.2, 1.5)])
    def test_learns_what_is_true(self, slope: float, offset: float) -> None:
        before = np.mean([np.abs(sigmoid(np.linspace(-2, 3, 50)) - sigmoid(slope * np.linspace(-2, 3, 50) + offset))])
        errors = []
        for seed in range(5):
            _, predicted, true = self.run(slope, offset, 300, seed)
            errors.append(np.abs(predicted - true).mean())
        assert np.mean(errors) < max(0.06, before / 2)

    def test_a_useless_drafter_is_found_out_within_ten_tokens(self) -> None:
        platt = OnlinePlatt()
        for _ in range(10):
            platt.update([1.0], [0.0])
        assert platt(np.asarray([1.0]))[0] < 0.3

    def test_follows_a_change(self) -> None:
        platt = OnlinePlatt()
        for happened in [1.0] * 300 + [0.0] * 60:
            platt.update([1.0], [happened])
        assert platt(np.asarray([1.0]))[0] < 0.4

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), max_size=200))
    def test_never_leaves_its_range_and_keeps_the_order(self, rows: list[tuple[float, bool]]) -> None:
        platt = OnlinePlatt()
        for x, happened in rows:
            platt.update([x], [float(happened)])
        values = platt(np.linspace(-9, 9, 50))
        assert np.isfinite(values).all()
        assert (np.diff(values) >= 0).all()
        assert (values >= 0).all()
        assert (values <= 1).all()

    def test_history_by_position(self) -> None:
        history = PositionHistory()
        assert history.upto(3) == pytest.approx([0.6] * 3)
        for _ in range(100):
            history.update(3, 1)  # the first is always kept, the second never
        first, second, third = history.upto(3)
        assert first > 0.97
        assert second < 0.03
        assert third < 0.03
