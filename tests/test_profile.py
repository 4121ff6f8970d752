"""Cost profiles: measured on a simulated machine, kept only when sound, found again only for the same pair."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dspark_cli.backends.base import Row, RowOutput
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import CalibrationFile, load_beliefs, own_path, sha256_of, shipped_path
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.profile import Job, Place, Profile, costs_of, measure
from dspark_cli.engine.rounds import Request
from simulated import Clock, Machine, TimedDrafter, TimedTarget, steady

JAGGED = {1: 10.0, 2: 15.0, 3: 19.0, 4: 18.0, 5: 25.0, 6: 24.0, 7: 33.0, 17: 70.0}


class DeepTarget(TimedTarget):
    """Each cached token adds (0.005 + 0.002 tokens) ms to a pass."""

    def step(self, rows: list[Row]) -> list[RowOutput]:  # type: ignore[override]
        extra = sum(self.length(r.seq) * (0.005 + 0.002 * len(r.tokens)) for r in rows)
        self.clock.spend(extra)
        self.native_ms += extra
        return super().step(rows)


def pair(
    noise: float = 0.0, kind: type[TimedTarget] = TimedTarget, *, n_seq: int = 1, each: float = 0.0
) -> tuple[TimedTarget, CombinedDrafter, Clock]:
    clock = Clock()
    target = kind(Curve(JAGGED), clock, noise=noise, n_seq=n_seq)
    target.request_features((0,))
    model = TimedDrafter(target, steady(0.5, 0.5), ms=Curve({1: 3.0, 4: 4.5}), each=each)
    return target, CombinedDrafter(model, LookupDrafter(), clock=clock), clock


def test_finds_the_jags_of_the_machine_within_its_time() -> None:
    target, drafter, clock = pair(noise=0.03)
    profile = measure(target, drafter, seconds=5.0, clock=clock)
    assert clock() < 6.0
    assert profile.doubt is None
    costs = profile.costs()
    curve = costs.verify_ms(1, 32, 7)
    for tokens in range(1, 8):
        assert curve[tokens] == pytest.approx(JAGGED[tokens], rel=0.1)
    assert curve[4] < curve[3]
    assert costs.pass_ms(1, 4) == pytest.approx(4.5, rel=0.1)
    assert target.length(0) == 0


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_what_another_width_costs_beside_its_tokens_is_measured(noise: float) -> None:
    """libllama builds a graph for it: passes that repeat a width do without."""
    target, drafter, clock = pair(noise=noise)
    target.switch = 1.5
    costs = measure(target, drafter, seconds=5.0, clock=clock).costs()
    assert costs.switch_ms == pytest.approx(1.5, abs=0.01 + 20 * noise)
    for tokens in (1, 2, 3, 4, 5):
        assert costs.verify.at(tokens) == pytest.approx(JAGGED[tokens], rel=0.01 + 2 * noise)
    assert CostModel.from_dict(costs.as_dict()).switch_ms == costs.switch_ms


def test_it_is_measured_without_a_drafter_too() -> None:
    """The widest pass ends one repetition and begins the next then: it must not be taken for a repeated one."""
    target, _, clock = pair()
    target.switch = 1.5
    costs = measure(target, LookupDrafter(), seconds=5.0, clock=clock).costs()
    assert costs.switch_ms == pytest.approx(1.5, abs=0.01)
    for tokens in (1, 2, 4, 17):
        assert costs.verify.at(tokens) == pytest.approx(JAGGED[tokens], rel=0.01)


def test_without_such_a_cost_none_is_found() -> None:
    target, drafter, clock = pair()
    assert measure(target, drafter, seconds=5.0, clock=clock).costs().switch_ms == 0.0


def test_depth_is_measured() -> None:
    target, drafter, clock = pair(kind=DeepTarget)
    costs = measure(target, drafter, seconds=8.0, clock=clock).costs()
    assert not costs.crowded
    at = costs.verify_ms(1, 1000, 5)
    assert at[1] == pytest.approx(10.0 + 7.0, rel=0.1)
    assert at[5] == pytest.approx(25.0 + 15.0, rel=0.1)


def test_a_neighbour_who_comes_and_goes_is_not_taken_for_the_cost_of_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the first three repetitions of some widths take twice as long: the curve is that of the quiet machine."""
    target, drafter, clock = pair(noise=0.02)
    step, calls = target.step, Counter[int]()

    def disturbed(rows: list[Row]) -> list[RowOutput]:
        width = len(rows[0].tokens)
        calls[width] += 1
        before, native = clock(), target.native_ms
        outputs = step(rows)
        if width in (1, 2) and calls[width] % 3:
            clock.spend(1e3 * (clock() - before))
            target.native_ms += target.native_ms - native
        return outputs

    monkeypatch.setattr(target, "step", disturbed)
    costs = measure(target, drafter, seconds=5.0, clock=clock).costs()
    for tokens in (1, 2, 3, 4):
        assert costs.verify.at(tokens) == pytest.approx(JAGGED[tokens], rel=0.1)


@pytest.mark.parametrize(
    ("slower", "repetitions"),
    [(1.0, 7), (4.0, 3)],
    ids=["more than all widths are timed", "no time to time all widths more than the least"],
)
@pytest.mark.parametrize("width", [3, 4, 6])
def test_a_width_of_which_all_first_repetitions_were_disturbed_is_timed_until_it_is_not(
    width: int, slower: float, repetitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours make it two fifths too dear: never tried then, so no round would ever show what it takes."""
    target, drafter, clock = pair(noise=0.01)
    target.ms = Curve({n: slower * ms for n, ms in JAGGED.items()})
    step, calls = target.step, Counter[int]()

    def disturbed(rows: list[Row]) -> list[RowOutput]:
        calls[len(rows[0].tokens)] += 1
        native = target.native_ms
        outputs = step(rows)
        if len(rows[0].tokens) == width and calls[width] <= repetitions:
            clock.spend(0.4 * (target.native_ms - native))
            target.native_ms += 0.4 * (target.native_ms - native)
        return outputs

    monkeypatch.setattr(target, "step", disturbed)
    costs = measure(target, drafter, seconds=5.0, clock=clock).costs()
    assert clock() < 6.5
    for tokens in (1, 2, 3, 4, 5, 6):
        assert costs.verify.at(tokens) == pytest.approx(slower * JAGGED[tokens], rel=0.05)


class TestOutOfLine:
    def found(self, verify: dict[int, float]) -> list[int]:
        samples = {Job("verify", 32, n): [1.1 * ms, ms] for n, ms in verify.items()}
        others = {Job("draft", 32, 1): [9.0], Job("draft", 32, 4): [1.0], Job("inject", 32, 2): [90.0]}
        return [job.tokens for job in Profile(samples | others, (32, 32)).out_of_line()]

    def test_a_straight_curve_has_nothing_out_of_line(self) -> None:
        assert self.found({n: 6.0 + n for n in (1, 2, 3, 4, 6, 8, 16)}) == []

    @pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
    def test_a_point_above_its_neighbours_is_at_every_place(self, n: int) -> None:
        curve = {m: 6.0 + m for m in (1, 2, 3, 4, 6, 8, 16)}
        assert n in self.found({**curve, n: 1.3 * curve[n]})

    def test_the_farthest_comes_first(self) -> None:
        assert self.found({1: 6.0, 2: 8.1, 3: 7.5, 4: 8.0, 5: 12.0, 6: 9.0, 7: 9.5})[:2] == [5, 2]

    def test_two_points_are_always_in_line(self) -> None:
        assert self.found({1: 6.0, 2: 60.0}) == []


def test_a_plain_pass_never_costs_more_than_a_wider_one() -> None:
    profile = Profile({Job("verify", 32, 1): [23.5, 24.0], Job("verify", 32, 2): [21.0, 21.5]}, (32, 32))
    assert profile.costs().verify.at(1) == 21.0


@pytest.mark.parametrize("n_seq", [2, 8, 16])
def test_drafts_of_several_sequences_are_measured(n_seq: int) -> None:
    target, drafter, clock = pair(noise=0.05, n_seq=n_seq, each=0.5)
    costs = measure(target, drafter, seconds=5.0, clock=clock).costs()
    for sequences in {1, 2, n_seq}:
        for block, ms in ((1, 3.0), (4, 4.5)):
            assert costs.pass_ms(sequences, block) == pytest.approx(ms * (1 + 0.5 * (sequences - 1)), rel=0.1)
    assert [target.length(seq) for seq in range(n_seq)] == [0] * n_seq
    assert not any(drafter.model.seen.values())  # type: ignore[attr-defined]


def test_a_slow_target_gets_fewer_widths_not_more_time() -> None:
    target, drafter, clock = pair()
    target.ms = Curve({n: 40 * ms for n, ms in JAGGED.items()})
    profile = measure(target, drafter, seconds=5.0, clock=clock)
    assert clock() < 20.0
    assert set(profile.ms("verify", profile.depths[0])) == {1, 2, 4}


def test_sessions_of_the_same_pair_measure_once(tmp_path: Path) -> None:
    target, drafter, _ = pair()
    notices: list[str] = []
    place = Place.of(target, drafter, None)
    assert place.load(notices.append) is None
    profile = measure(target, drafter, seconds=5.0, clock=target.clock)
    place.save(profile)
    assert notices == []
    again = Place.of(target, drafter, None).load(notices.append)
    assert again is not None
    assert again.as_dict() == profile.costs().as_dict()
    assert notices == []
    assert [p.suffix for p in place.path.parent.iterdir()] == [".json"]


def saved() -> tuple[Place, list[str]]:
    target, drafter, _ = pair()
    place = Place.of(target, drafter, None)
    place.save(measure(target, drafter, seconds=5.0, clock=target.clock))
    return place, []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "damaged"),
        (lambda text: text.replace("dspark-profile/3", "dspark-profile/2"), "another version of dspark"),
        (lambda text: json.dumps({**json.loads(text), "costs": {"verify": {"1": -1}}}), "damaged"),
        (
            lambda text: json.dumps({**json.loads(text), "costs": {**json.loads(text)["costs"], "verify": {}}}),
            "damaged",
        ),
    ],
)
def test_a_damaged_file_is_measured_again_with_one_line(damage: object, says: str) -> None:
    place, notices = saved()
    place.path.write_text(damage(place.path.read_text()))  # type: ignore[operator]
    assert place.load(notices.append) is None
    assert len(notices) == 1
    assert says in notices[0]
    assert "\n" not in notices[0]


@pytest.mark.parametrize("what", ["machine", "library", "model", "drafter_file"])
def test_a_profile_of_something_else_is_measured_again(what: str) -> None:
    place, notices = saved()
    other = Place(place.path, {**place.key, what: "another"})
    assert other.load(notices.append) is None
    assert notices == [f"the cost profile {place.path.name} is of another {what.replace('_', ' ')}: measuring again"]


def test_a_busy_machine_is_measured_but_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_PROFILE_SECONDS", "5")
    target, drafter, _ = pair(noise=0.6)
    notices: list[str] = []
    place = Place.of(target, drafter, None)
    costs = costs_of(target, drafter, place, notices.append)
    assert costs.verify.known
    assert not place.path.exists()
    assert any("busy" in n and "not kept" in n for n in notices)


def test_a_machine_too_slow_to_time_passes_twice_is_not_called_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds a pass: nothing is timed twice, so nothing is known of how much times differ."""
    monkeypatch.setenv("DSPARK_PROFILE_SECONDS", "5")
    target, drafter, clock = pair()
    target.ms = Curve({n: 200 * ms for n, ms in JAGGED.items()})
    monkeypatch.setattr("dspark_cli.engine.profile.measure", partial(measure, clock=clock))
    notices: list[str] = []
    place = Place.of(target, drafter, None)
    assert costs_of(target, drafter, place, notices.append).verify.known
    assert not place.path.exists()
    assert notices[1:] == ["not every pass could be timed twice: this measurement is not kept"]


class ReplayingTarget(TimedTarget):
    """libllama on a GPU: the first two passes of another shape than before are launched kernel by kernel."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.info = replace(self.info, backend="llamacpp", device="gpu")
        self._shape, self._same = 0, 0

    def step(self, rows: list[Row]) -> list[RowOutput]:  # type: ignore[override]
        shape = sum(len(r.tokens) for r in rows)
        self._same = self._same + 1 if shape == self._shape else 0
        self._shape = shape
        if self._same < 2:
            self.clock.spend(9.0)
            self.native_ms += 9.0
        return super().step(rows)


def test_on_a_gpu_passes_are_timed_as_they_are_replayed() -> None:
    target, drafter, clock = pair(kind=ReplayingTarget)
    costs = measure(target, drafter, seconds=8.0, clock=clock).costs()
    for tokens in (1, 2, 4, 5):
        assert costs.verify_ms(1, 32, 8)[tokens] == pytest.approx(JAGGED[tokens], rel=0.1)


class RecordingTarget(TimedTarget):
    """Records a pass when its shape first comes, which takes 150 ms more, and replays it from then on."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.info = replace(self.info, details={"capture": "graph"})
        self.recorded: set[tuple[int, bool]] = set()

    def step(self, rows: list[Row]) -> list[RowOutput]:  # type: ignore[override]
        shape = (sum(len(row.tokens) for row in rows), self.length(rows[0].seq) > 256)
        if shape[0] < 32 and shape not in self.recorded:  # wide ones, of prompts, are not recorded
            self.recorded.add(shape)
            self.clock.spend(150.0)
            self.native_ms += 150.0
        return super().step(rows)


def jobs_of(profile: Profile) -> set[tuple[bool, str, int]]:
    return {(job.depth == profile.depths[0], job.kind, job.tokens) for job in profile.samples}


def test_recording_a_pass_is_no_cost_of_it_and_takes_no_time_from_measuring() -> None:
    target, drafter, clock = pair(noise=0.02, kind=RecordingTarget)
    profile = measure(target, drafter, seconds=5.0, clock=clock)
    assert profile.doubt is None, "a recording among the samples looks like a busy machine"
    assert max(max(samples) for samples in profile.samples.values()) < 150.0
    other, drafter, its_clock = pair(noise=0.02)
    wanted = measure(other, drafter, seconds=5.0, clock=its_clock)
    assert jobs_of(profile) == jobs_of(wanted)
    assert profile.repeats == wanted.repeats
    assert clock() - its_clock() < 0.15 * len(target.recorded) + 1.0
    assert target.length(0) == 0


def test_an_interrupted_measurement_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter, _ = pair()
    calls = [0]
    step = target.step

    def interrupted(rows: list[Row]) -> list[RowOutput]:
        calls[0] += 1
        if calls[0] > 20:
            raise KeyboardInterrupt
        return step(rows)

    monkeypatch.setattr(target, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        costs_of(target, drafter, Place.of(target, drafter, None), lambda text: None)
    assert not Place.of(target, drafter, None).path.exists()
    assert target.length(0) == 0


def test_a_clock_that_goes_backwards_is_no_measurement() -> None:
    target, drafter, clock = pair()
    target.native_ms = 1e9
    step = target.step

    def back(rows: list[Row]) -> list[RowOutput]:
        outputs = step(rows)
        target.native_ms -= 500.0
        return outputs

    target.step = back  # type: ignore[method-assign, assignment]
    profile = measure(target, drafter, seconds=2.0, clock=clock)
    assert not profile.ms("verify", profile.depths[0])
    with pytest.raises(ValueError, match="cost curve"):
        profile.costs()


def test_no_time_to_measure_still_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_PROFILE_SECONDS", "0")
    target, drafter, clock = pair()
    place = Place.of(target, drafter, None)
    costs = costs_of(target, drafter, place, lambda text: None)
    assert not place.path.exists()
    rounds = list(Engine(target, drafter, AutoSchedule(costs), clock=clock).run([Request([1, 2], 30)]))
    assert sum(len(r.tokens) for r in rounds) == 30


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    target, drafter, _ = pair()
    (tmp_path / "file").write_text("")
    Place(tmp_path / "file" / "x.json", {}).save(measure(target, drafter, seconds=5.0, clock=target.clock))


class TestCalibrationFiles:
    def drafter(self, folder: Path) -> Path:
        path = folder / "d.gguf"
        path.write_bytes(b"drafter")
        return path

    def file(self, path: Path, **change: object) -> CalibrationFile:
        raw = {
            "drafter_sha256": sha256_of(path),
            "source": "dspark",
            "temperatures": (1.5, 2.0),
            "survival": (0.8, 0.5),
        }
        return CalibrationFile(**{**raw, **change})  # type: ignore[arg-type]

    def test_shipped_is_found_and_the_users_own_goes_first(self, tmp_path: Path) -> None:
        path, notices = self.drafter(tmp_path), list[str]()
        assert load_beliefs(path, notices.append) == {}
        self.file(path).save(shipped_path(path))
        assert load_beliefs(path, notices.append)["dspark"].sts.temperatures == (1.5, 2.0)
        self.file(path, temperatures=(3.0,)).save(own_path(path))
        belief = load_beliefs(path, notices.append)["dspark"]
        assert belief.sts.temperatures == (3.0,)
        assert belief.survival == (0.8, 0.5)
        assert notices == []
        assert CalibrationFile.load(own_path(path)) == self.file(path, temperatures=(3.0,))

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "x"}', '{"schema": "dspark-calibration/1"}'])
    def test_a_damaged_one_is_not_used(self, tmp_path: Path, text: str) -> None:
        path, notices = self.drafter(tmp_path), list[str]()
        shipped_path(path).write_text(text)
        assert load_beliefs(path, notices.append) == {}
        assert len(notices) == 1

    def test_one_for_another_drafter_is_not_used(self, tmp_path: Path) -> None:
        path, notices = self.drafter(tmp_path), list[str]()
        self.file(path).save(shipped_path(path))
        path.write_bytes(b"retrained")
        assert load_beliefs(path, notices.append) == {}
        assert "another version of d.gguf" in notices[0]


def test_the_machine_of_the_simulation_agrees_with_its_profile() -> None:
    machine = Machine(steady(0.9, 0.9))
    assert machine.costs().verify_ms(1, 0, 4)[4] == 17.0
