"""The bench: rows, oracle and report from recorded rounds; the command on the embedded model; what it refuses."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_cli.bench import local
from dspark_cli.bench.local import Results, Run, Settings
from dspark_cli.bench.oracle import SeenSurvival, TrueCosts, _best_rate, judge
from dspark_cli.bench.plots import bars, lines, ticks
from dspark_cli.bench.prompts import KINDS
from dspark_cli.bench.recorded import Halves, calibrate, expected_speed, schedule_for
from dspark_cli.bench.report import as_html
from dspark_cli.bench.summary import CSV_COLUMNS, SCHEMA, as_csv, interval, summarise
from dspark_cli.cli import app
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import load_beliefs
from dspark_cli.engine.schedule import Fixed, Off, Schedule
from dspark_cli.engine.stats import Stats
from simulated import Machine, honest
from synthetic import SPEC, random_tensors, write
from test_calibration import law

DESIGN_KEYS = {
    *("arm", "format", "kind", "temperature", "decode_tok_s", "decode_tok_s_min", "decode_tok_s_max", "ratio_to_plain"),
    *("ratio_to_best_static", "ratio_ci", "accepted_length", "verified_per_round", "parked_share", "identical"),
    "first_difference",
}


def simulated_runs(machine: Machine, repeats: int = 3, kinds: tuple[str, ...] = ("question", "story")) -> list[Run]:
    """Cycles of a simulated machine: exact times, so that what the summary says can be checked."""
    schedules: dict[str, Schedule] = {"auto": AutoSchedule(machine.costs())} | {
        f"fixed:{n}": Fixed(n) for n in (1, 2, 3, 4)
    }
    runs: list[Run] = []
    for repeat, kind in itertools.product(range(repeats), kinds):
        for name, schedule in {"plain": Off(), **schedules}.items():
            _, rounds = machine.run(schedule, 120, seed=repeat)
            stats = Stats()
            for item in rounds:
                stats.add(item)
            runs.append(Run(name, "Q4_1", KINDS[kind][0], 0.0, stats, rounds))
        cycle = runs[-1 - len(schedules) :]
        for run in cycle:
            run.plain_tok_s = cycle[0].stats.decode_tok_s
    return runs


@pytest.fixture(scope="module")
def summary() -> dict[str, object]:
    machine = Machine(honest(0.4, 1.0))
    results = Results(simulated_runs(machine), {"Q4_1": machine.costs()}, {"auto": "timed"}, "m", "fake", "cpu")
    return summarise(results)


class TestSummary:
    def test_rows_have_the_documented_keys(self, summary: dict[str, object]) -> None:
        assert summary["schema"] == SCHEMA == "dspark-bench/1"
        rows: list[dict[str, object]] = summary["rows"]  # type: ignore[assignment]
        assert {r["kind"] for r in rows} == {"question", "story", "all"}
        assert {r["arm"] for r in rows} == {"plain", "auto", "fixed:1", "fixed:2", "fixed:3", "fixed:4"}
        for row in rows:
            assert set(row) >= DESIGN_KEYS
        json.dumps(summary)

    def test_every_key_is_documented(self, summary: dict[str, object]) -> None:
        text = (Path(__file__).parent.parent / "docs" / "bench.md").read_text()
        for part in (summary, summary["rows"][0], summary["oracle"][0], summary["runs"][0], summary["reliability"][0]):  # type: ignore[index]
            assert all(f"`{key}`" in text for key in part), [k for k in part if f"`{k}`" not in text]  # type: ignore[attr-defined]

    def test_ratios_are_those_of_the_cycles(self, summary: dict[str, object]) -> None:
        rows = {(r["arm"], r["kind"]): r for r in summary["rows"]}  # type: ignore[index, attr-defined]
        plain = rows["plain", "all"]
        assert plain["ratio_to_plain"] == 1.0
        assert plain["ratio_ci"] == [1.0, 1.0]
        for row in rows.values():
            assert row["ratio_ci"][0] <= row["ratio_to_plain"] <= row["ratio_ci"][1]
            assert row["ratio_worst_prompt"] <= row["ratio_to_plain"] + 1e-9
            best = rows[row["best_static"], row["kind"]]
            assert best["ratio_to_best_static"] == 1.0
            assert best["ratio_to_plain"] == max(
                r["ratio_to_plain"] for (a, k), r in rows.items() if k == row["kind"] and a != "auto"
            )

    def test_the_oracle_is_never_beaten_by_what_it_judges(self, summary: dict[str, object]) -> None:
        for found in summary["oracle"]:  # type: ignore[attr-defined]
            assert 0.85 < found["auto_to_oracle"] <= 1.0 + 1e-9
            assert found["oracle_to_plain"] >= 1.0

    def test_csv_reads_back(self, summary: dict[str, object]) -> None:
        rows = list(csv.DictReader(io.StringIO(as_csv(summary))))
        assert len(rows) == len(summary["rows"])  # type: ignore[arg-type]
        assert tuple(rows[0]) == CSV_COLUMNS
        assert float(rows[0]["decode_tok_s"]) > 0
        assert all(value != "" for value in rows[0].values())

    def test_interval(self) -> None:
        values = np.random.default_rng(0).normal(1.2, 0.1, size=200).tolist()
        low, high = interval(values)
        assert 1.15 < low < 1.2 < high < 1.25
        assert interval([1.5]) == [1.5, 1.5]


class TestOracle:
    def test_choices_equal_brute_force(self) -> None:
        random = np.random.default_rng(1)
        for _ in range(30):
            plain = 10.0
            rounds = [
                (np.cumprod(random.uniform(0.2, 1.0, size=2)), np.cumsum(random.uniform(1.0, 8.0, size=3)) + 8.0)
                for _ in range(4)
            ]
            options = [[(1.0, plain)] + [(1.0 + a[:n].sum(), cost[n]) for n in range(3)] for a, cost in rounds]
            best = max(sum(t for t, _ in pick) / sum(ms for _, ms in pick) for pick in itertools.product(*options))
            assert _best_rate(rounds, plain) == pytest.approx(max(best, 1 / plain), rel=1e-6)

    def test_sees_true_costs_and_survivals(self) -> None:
        machine = Machine(honest(0.2, 1.0), noise=0.0)
        runs = simulated_runs(machine, repeats=6)
        costs = TrueCosts.of(runs)
        for n in (1, 2, 3, 4, 5):
            assert costs.verify[n] == pytest.approx(machine.verify[n])
        assert costs.drafting["timed"] == pytest.approx(3.5)
        rounds = [item for run in runs for item in run.rounds if not item.is_prefill]
        seen = SeenSurvival(rounds)
        errors = [abs(seen(r)[0] - r.confidence[0]) for r in rounds if r.drafted and r.confidence]
        assert np.mean(errors) < 0.1  # this drafter's confidence is the truth
        assert judge([r for r in runs if r.arm != "auto"]) is None


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]


def test_the_report_is_one_file_with_all_plots(summary: dict[str, object]) -> None:
    text = as_html(summary)
    page = _Page()
    page.feed(text)
    assert page.addresses == []
    assert page.tags.count("svg") == 4  # speed, acceptance, costs, reliability
    assert page.tags.count("table") == 3
    assert "script" not in page.tags
    assert all(name in text for name in ("fixed:4", "auto", "ECE", "oracle"))
    assert not re.search(r"nan|inf\b", text.lower().replace("info", ""))


def test_names_in_the_report_are_escaped(summary: dict[str, object]) -> None:
    text = as_html({**summary, "model": "<b>&x"})
    assert "<b>&x" not in text
    assert "&lt;b&gt;&amp;x" in text


def test_plots_of_little() -> None:
    assert "svg" in bars("t", {}, "y")
    assert "svg" in lines("t", {"a": []}, "x", "y")
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert len(ticks(0, 173.0)) <= 7


@pytest.mark.parametrize(
    ("right", "marked"), [(0.2, ["0.05", "0.1"]), (17.0, ["1", "16", "17"]), (301.0, ["100", "300"])]
)
def test_every_width_of_a_plot_has_some_marks_and_not_too_many(right: float, marked: list[str]) -> None:
    marks = re.findall(r'y="248" class="tick"[^>]*>([^<]*)', lines("t", {"a": [(0.0, 1.0), (right, 2.0)]}, "x", "y"))
    assert set(marked) <= set(marks)
    assert 4 <= len(marks) <= 21


class TestCalibrate:
    def test_halves_ece_and_says_so(self) -> None:
        halves = Halves("dspark", law(2000, 3, [2.5, 2.5, 2.5], seed=1), law(2000, 3, [2.5, 2.5, 2.5], seed=2))
        sts, found = calibrate(halves)
        assert found["used"]
        assert found["ece_after"] < found["ece_before"] / 2
        assert len(sts.temperatures) == 3

    def test_too_few_rounds_fit_nothing(self) -> None:
        sts, found = calibrate(Halves("dspark", law(30, 3, [2.0] * 3, seed=1), law(30, 3, [2.0] * 3, seed=2)))
        assert sts.temperatures == ()
        assert not found["used"]

    def test_the_schedule_that_follows(self) -> None:
        costs = Machine(honest(0.0, 1.0)).costs()
        sure, unsure = schedule_for(costs, 0.98, 4), schedule_for(costs, 0.1, 4)
        assert sure["verify"] >= 3
        assert sure["speed"] > 1.5
        assert (unsure["verify"], unsure["speed"]) == (0, 1.0)
        assert expected_speed(costs, [0.98, 0.96, 0.94], 4)["verify"] == 3


class TestCommand:
    run = staticmethod(lambda *words: CliRunner().invoke(app, ["bench", *words]))

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ([], "--local"),
            (["--local", "--kinds", "poem"], "copy-edit"),
            (["--local", "--temperatures", "hot"], "numbers"),
            (["--local", "--temperatures", "-1"], "0 to 10"),
            (["--local", "--json", "--csv"], "--out"),
            (["--local", "--html", "/no/such/folder/x.html"], "no folder"),
            (["--local", "--formats", "Q9_9"], "Q4_K_M"),
        ],
    )
    def test_bad_input_says_what_is_allowed(self, words: list[str], says: str) -> None:
        done = self.run(*words)
        assert done.exit_code == 2, done.output
        assert says in done.output

    SMALL = (
        "--local",
        "--kinds",
        "copy-edit",
        "--temperatures",
        "0",
        "--prompts",
        "1",
        "--tokens",
        "8",
        "--repeats",
        "1",
    )

    @pytest.fixture
    def few_arms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local, "LENGTHS", (1, 16))
        monkeypatch.setattr(local, "THRESHOLDS", (0.5,))

    def test_a_small_run_of_chosen_arms(self, embedded_gguf: Path, tmp_path: Path) -> None:
        report, out = tmp_path / "r.html", tmp_path / "r.json"
        arms = ("--arms", "auto,fixed:1, fixed:16,threshold:0.5")
        done = self.run(str(embedded_gguf), *self.SMALL, *arms, "--csv", "--html", str(report), "--out", str(out))
        assert done.exit_code == 0, done.output
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert {"plain", "auto", "fixed:1", "fixed:16", "threshold:0.5"} == {r["arm"] for r in rows}
        raw = json.loads(out.read_text())
        assert raw["schema"] == SCHEMA
        assert not raw["interrupted"]
        assert report.read_text().startswith("<!doctype html>")

    def test_an_unknown_arm_is_named_with_those_there_are(self, embedded_gguf: Path) -> None:
        done = self.run(str(embedded_gguf), *self.SMALL, "--arms", "auto,fixed:99")
        assert done.exit_code == 2
        assert "unknown arm 'fixed:99': one of plain, auto, fixed:1," in " ".join(done.output.split())

    @pytest.mark.usefixtures("few_arms")
    def test_ctrl_c_keeps_what_is_finished(self, embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        answered, answer = [0], local._answer

        def interrupted(*given: object) -> object:
            answered[0] += 1
            if answered[0] > 5 + 6 + 3:  # warm-up, a cycle, half a cycle
                raise KeyboardInterrupt
            return answer(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(local, "_answer", interrupted)
        words = [w if w != "1" else "4" for w in self.SMALL]
        done = self.run(str(embedded_gguf), *words, "--json")
        assert done.exit_code == 130
        raw = json.loads(done.stdout)
        assert raw["interrupted"]
        assert {r["runs"] for r in raw["rows"]} == {1}
        assert len(raw["rows"]) == 5


class TestCalibrateCommand:
    run = staticmethod(lambda *words: CliRunner().invoke(app, ["calibrate", *words]))

    def test_without_a_drafter(self) -> None:
        done = self.run("smollm2-135m", "--drafter", "none")
        assert done.exit_code == 2
        assert "nothing to calibrate" in done.output

    @pytest.mark.slow
    def test_lookup_is_reported_and_not_written(self, embedded_gguf: Path) -> None:
        done = self.run(str(embedded_gguf), "--rounds", "20", "--tokens", "24", "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["confidence"]["source"] == "lookup"
        assert found["written"] is None
        assert found["costs"]["verify_ms"]["1"] > 0
        assert {by["1"] for by in found["logits_apart"].values()} == {0.0}
        lengths = [row["verify"] for row in found["schedule"]]
        assert lengths == sorted(lengths, reverse=True)  # from the surest pattern to the least sure
        assert all(row["speed"] >= 1.0 for row in found["schedule"])

    @pytest.mark.slow
    def test_a_drafter_file_gets_a_calibration_that_sessions_load(self, embedded_gguf: Path, tmp_path: Path) -> None:
        drafter = write(tmp_path, random_tensors(), SPEC)
        words = ("--drafter", str(drafter), "--rounds", "20", "--tokens", "64")
        done = self.run(str(embedded_gguf), *words)
        assert done.exit_code == 0, done.output
        assert "(0 held-out" not in done.output  # the first answer has all the rounds asked for
        assert "wrote" in done.output
        assert "ECE" in done.output
        assert "off by, 48 tokens in" in done.output
        notices = list[str]()
        belief = load_beliefs(drafter, notices.append)["dspark"]
        assert notices == []
        assert max(belief.survival) < 0.5  # random weights


def test_settings_cover_every_kind_and_temperature() -> None:
    cases = Settings(prompts=1).cases()
    assert len(cases) == len(KINDS) * 2
    assert {p.kind for p, _ in cases} == set(KINDS)
    assert all(len(prompts) == 4 for prompts in KINDS.values())
