"""Runs over a tiny table target: outputs of every kind, failures apart, order, determinism, memory, overhead."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from killed import job, session
from test_crash import results, words

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.batch.inputs import ReadOptions
from dspark_cli.batch.items import PromptOptions
from dspark_cli.batch.output import Output
from dspark_cli.batch.progress import ENOUGH, Figures, clock_text
from dspark_cli.batch.runner import Job, run_job
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.rounds import Round, SamplingOptions, Times
from dspark_cli.registry.parallel import choose
from dspark_cli.registry.plan import Device, PlanOptions, TargetSize, make_plan


def run(mine: Job, *, n_seq: int = 4, n_ctx: int = 64, **options: Any) -> tuple[bool, Figures]:
    figures = Figures(len(mine.known))
    whole = run_job(mine, lambda: session(n_seq=n_seq, n_ctx=n_ctx), figures, **options)
    return whole, figures


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seven records, three of them bad."""
    path = tmp_path / "in.jsonl"
    records = [
        {"id": "a", "prompt": "abc"},
        {"id": "b", "prompt": "x" * 70},
        {"id": "c"},
        {"id": "d", "prompt": "def", "max_tokens": 3},
        {"id": "e", "prompt": "abcdefgh", "temperature": 1.0, "seed": 4},
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n{broken\n" + json.dumps({"prompt": "xyz"}) + "\n")
    return path


def test_results_and_error_lines(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    whole, figures = run(job([mixed], out))
    found = results(out)
    assert not whole
    assert (figures.done, figures.failed) == (4, 3)
    assert [r["line"] for r in found] == list(range(1, 8))
    assert [r["id"] for r in found] == ["a", "b", "c", "d", "e", None, None]
    assert found[1]["error"] == "the prompt has 70 tokens, the context holds 64"
    assert found[2]["error"] == "neither `prompt` nor `messages`"
    assert found[5]["error"].startswith("not JSON")
    assert {r["finish_reason"] for r in found if "error" in r} == {"error"}
    good = found[0]
    assert good["tokens"] == len(good["text"]) == 12
    assert found[3]["tokens"] == 3
    assert (found[4]["temperature"], found[4]["seed"]) == (1.0, 4)
    assert good["file"] == str(mixed)
    for key in ("model", "ids_sha256", "accepted_length", "time_ms", "near_ties", "prompt_tokens"):
        assert key in good


def test_fail_fast_stops_and_resume_goes_on(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DsparkError, match=r"in\.jsonl:2: the prompt has 70 tokens, the context holds 64"):
        run(job([mixed], out, fail_fast=True), n_seq=1)
    assert [r["line"] for r in results(out)] == [1, 2]
    run(job([mixed], out))
    assert [r["line"] for r in results(out)] == list(range(1, 8))


def test_errors_count_as_done_unless_they_are_to_be_tried_again(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(job([mixed], out))
    whole, figures = run(job([mixed], out))
    assert (whole, figures.skipped, figures.failed) == (False, 7, 0)
    _, figures = run(job([mixed], out), n_ctx=128, retry_errors=True)  # with a longer context one more fits
    assert (figures.skipped, figures.done, figures.failed) == (4, 1, 2)
    assert [r["line"] for r in results(out)] == list(range(1, 8))


def test_an_answer_depends_on_its_prompt_and_seed_only(tmp_path: Path) -> None:
    """Alone, among others, in another order, beside one sequence or eight: the same text, greedy and sampled."""
    made = words(24)
    texts: list[dict[str, str]] = []
    for name, order, n_seq in (("a", made, 8), ("b", made[::-1], 3), ("c", made[5:6], 1)):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(order))
        for temperature in (0.0, 1.0):
            out = tmp_path / f"{name}{temperature}.jsonl"
            prompting = PromptOptions(SamplingOptions(temperature=temperature, seed=5), 12, raw=True)
            run(job([path], out, prompting=prompting), n_seq=n_seq)
            texts.append({order[r["line"] - 1]: r["text"] for r in results(out)})
    for greedy, other in ((texts[0], texts[2]), (texts[0], texts[4]), (texts[1], texts[3]), (texts[1], texts[5])):
        assert all(greedy[word] == text for word, text in other.items())
    assert texts[0] != texts[1]


def test_unordered_results_come_as_they_are_finished(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "abc", "max_tokens": 40}\n' + '{"prompt": "abd", "max_tokens": 2}\n' * 5)
    run(job([path], tmp_path / "a.jsonl", unordered=True), n_seq=2)
    run(job([path], tmp_path / "b.jsonl"), n_seq=2)
    assert [r["line"] for r in results(tmp_path / "a.jsonl")][-1] == 1
    assert [r["line"] for r in results(tmp_path / "b.jsonl")] == [1, 2, 3, 4, 5, 6]


# -- other outputs -----------------------------------------------------------------------------------------------------


def test_csv_gets_columns_added(tmp_path: Path) -> None:
    path, out = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text('n,prompt\n1,abc\n"2,5",de\n3\n4,\n5,xyz\n')
    run(job([path], out, ReadOptions()))
    rows = list(csv.DictReader(out.open()))
    assert [r["n"] for r in rows] == ["1", "2,5", "3", "4", "5"]
    assert list(rows[0]) == ["n", "prompt", "answer", "answer_error"]
    texts = [r.get("text", "") for r in results(tmp_path / "out.csv.results.jsonl")]
    assert [r["answer"] for r in rows] == texts
    assert rows[2]["answer_error"] == "1 fields, the header has 2"
    assert rows[3]["answer_error"] == "the prompt is empty"
    assert len(rows[0]["answer"]) == 12


def test_csv_after_an_interruption(tmp_path: Path) -> None:
    path, out = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text("prompt\n" + "\n".join(words(40)) + "\n")
    left = iter(range(100))

    def tick() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job([path], out), tick=tick)
    assert not out.exists()
    run(job([path], out))
    assert len(list(csv.DictReader(out.open()))) == 40


def test_a_folder_has_a_file_per_input(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "answers"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("abc\ndef\n")
    (source / "deep" / "b.jsonl").write_text('{"prompt": "xyz"}\n{"prompt": ""}\n')
    run(job([source], out, folder=True))
    assert [r["line"] for r in results(out / "a.txt.jsonl")] == [1, 2]
    assert [r["finish_reason"] for r in results(out / "deep" / "b.jsonl")] == ["length", "error"]
    assert len(results(out / "_results.jsonl")) == 4
    (out / "a.txt.jsonl").unlink()
    run(job([source], out, folder=True))  # with everything done, what is missing is written again
    assert [r["line"] for r in results(out / "a.txt.jsonl")] == [1, 2]


def test_whole_files_become_whole_answers(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "answers"
    source.mkdir()
    for name in ("a.txt", "b.md"):
        (source / name).write_text("abcdef")
    run(job([source], out, ReadOptions(whole_files=True), folder=True))
    assert (out / "a.txt").read_text() == (out / "b.md").read_text() == results(out / "_results.jsonl")[0]["text"]


@pytest.mark.parametrize(
    ("out", "resume", "says"),
    [
        ("there.jsonl", False, "there.jsonl is there already"),
        ("out.parquet", False, "neither .jsonl nor .csv"),
        ("out.csv", False, "adds a column to CSV inputs, and .*in.txt is none"),
        ("nowhere/out.jsonl", False, "the folder .*nowhere of -o does not exist"),
        ("folder.jsonl", True, "folder.jsonl is a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_at_once(tmp_path: Path, out: str, resume: bool, says: str) -> None:
    (tmp_path / "in.txt").write_text("abc\n")
    (tmp_path / "there.jsonl").write_text("something\n")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DsparkError, match=says):
        job([tmp_path / "in.txt"], tmp_path / out, resume=resume)


def test_an_output_must_be_named_once() -> None:
    for given in ((None, None), (Path("a.jsonl"), Path("b"))):
        with pytest.raises(BadInput, match="say where results go"):
            Output.of(*given, unordered=False)


def test_answers_never_overwrite_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("abc")
    with pytest.raises(BadInput, match="holds the inputs"):
        job([tmp_path / "a.md"], tmp_path, ReadOptions(whole_files=True), folder=True, resume=False)
    (tmp_path / "a.csv").write_text("prompt,answer\nabc,x\n")
    with pytest.raises(BadInput, match="has a column 'answer'"):
        job([tmp_path / "a.csv"], tmp_path / "out.csv", resume=False)


# -- cost of the program itself ----------------------------------------------------------------------------------------


def tiny(path: Path, count: int) -> Path:
    made = words(count)
    path.write_text("".join(f'{{"id": {i}, "prompt": "{word}", "max_tokens": 1}}\n' for i, word in enumerate(made)))
    return path


def test_ten_thousand_tiny_items_come_out_in_order(tmp_path: Path) -> None:
    """What they cost beside the native passes is measured by tests/measure_overhead.py."""
    out = tmp_path / "out.jsonl"
    run(job([tiny(tmp_path / "in.jsonl", 10_000)], out))
    assert [r["id"] for r in results(out)] == list(range(10_000))


def test_memory_stays_flat(tmp_path: Path) -> None:
    """What remains of an item is where its result stands."""
    mine = job([tiny(tmp_path / "in.jsonl", 2_500)], tmp_path / "out.jsonl")
    figures, marks = Figures(len(mine.known)), {}

    def tick() -> None:
        if figures.done in (500, 2_500):
            marks[figures.done] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        run_job(mine, session, figures, tick=tick)
    finally:
        tracemalloc.stop()
    assert marks[2_500] - marks[500] < 2_000 * 500


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_of_progress() -> None:
    now = [0.0]
    figures = Figures(40, skipped=10, clock=lambda: now[0])
    figures.start(CostModel(Curve({1: 10.0, 2: 12.0, 4: 20.0}), own_ms=0.0))
    now[0] = 10.0
    for _ in range(ENOUGH // 2):
        times = Times(verify=16.0)
        for request in range(2):
            # Two requests, two tokens each, in 16 ms; plain decoding makes one each in 12 ms.
            figures.add(Round(request, (1, 2), verified=2, accepted=1, shared=2, times=times), depth=0)
    figures.done, figures.failed = 5, 1
    assert figures.against_plain == pytest.approx(2 * 12 / 16)
    assert figures.tok_s == pytest.approx(2 * ENOUGH / 10)
    assert figures.left_s == pytest.approx(10 / 5 * 24)
    assert figures.line() == (
        f"16 of 40 items, 1 failed, {figures.tok_s:.1f} tok/s, 1.50x plain (estimated), 50% accepted, 0:48 left"
    )
    assert clock_text(3725) == "1:02:05"


def test_rounds_beside_prompts_are_not_set_against_plain() -> None:
    figures = Figures(4)
    figures.start(CostModel(Curve({1: 10.0})))
    for _ in range(ENOUGH + 1):
        figures.add(Round(0, (1,), beside=64, times=Times(verify=1.0)), depth=0)
    assert figures.against_plain is None


# -- how many at once --------------------------------------------------------------------------------------------------

SIZES = TargetSize(100_000_000, n_layer=30, n_embd=576, n_vocab=49152, kv_values=30 * 2 * 192, n_ff=1536)


def planner(free: int) -> Any:
    device = Device("cpu", "cpu", total=free, free=free)
    return lambda n: make_plan(device, "llamacpp", SIZES, None, PlanOptions(ctx=4096, n_seq=n))


@pytest.mark.parametrize(
    ("free_gb", "n_seq", "most", "expected"),
    [
        (16, None, 1000, 16),
        (16, None, 3, 4),
        (16, None, 1, 1),
        (1.2, None, 1000, 8),
        (0.3, None, 1000, 1),
        (16, 5, 2, 5),
    ],
)
def test_parallel_follows_memory_and_items(free_gb: float, n_seq: int | None, most: int, expected: int) -> None:
    assert choose(planner(int(free_gb * 1e9)), "m", n_seq, most).n_seq == expected


def test_too_many_sequences_say_how_many_fit() -> None:
    with pytest.raises(NotReady, match=r"m with 64 sequences of 4096 tokens needs .* GB") as info:
        choose(planner(2_000_000_000), "m", 64, 1000)
    assert info.value.hint is not None
    fitting = int(info.value.hint.split()[1].strip(","))
    assert planner(2_000_000_000)(fitting).fits
    assert not planner(2_000_000_000)(fitting + 1).fits
    for wrong in (0, 257):
        with pytest.raises(BadInput, match="between 1 and 256"):
            choose(planner(2_000_000_000), "m", wrong, 10)
