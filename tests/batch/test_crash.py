"""Whatever ends a run, the output in the end is that of a run that nothing ended."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from killed import job, session

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.batch import journal as journal_module
from dspark_cli.batch.journal import Journal
from dspark_cli.batch.progress import Figures
from dspark_cli.batch.runner import Job, run_job

KILLS = 100


def words(count: int, seed: int = 0) -> list[str]:
    random = Random(seed)
    return ["".join(random.choices("abcdefghij", k=random.randint(3, 12))) for _ in range(count)]


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(path: Path) -> list[tuple[str, int, str]]:
    """What must be equal however often a run was ended."""
    return [(r["file"], r["line"], r.get("text", r.get("error"))) for r in results(path)]


def run(mine: Job, **options: Any) -> Figures:
    figures = Figures(len(mine.known))
    run_job(mine, session, figures, **options)
    return figures


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(words(200)) + "\n")
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hundred_kills(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    inputs = tmp_path / "in.jsonl"
    limits = Random(1)
    lines = [json.dumps({"prompt": word, "max_tokens": limits.randint(2, 12)}) for word in words(200)]
    inputs.write_text("\n".join(lines) + "\n")
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(inputs), str(out), str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    at_death = [int(n) for n in done.stdout.split()]
    assert len(at_death) == KILLS, "runs ended before they were killed"
    assert len(set(at_death)) > KILLS / 4, "kills did not fall into the run"
    run(job([inputs], tmp_path / "whole.jsonl"))
    assert told(out) == told(tmp_path / "whole.jsonl")
    assert len(results(out)) == 200
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.lock"))


def test_a_file_torn_anywhere_is_repaired(inputs: Path, tmp_path: Path) -> None:
    """A power loss may leave any beginning of the file, or zeros at its end."""
    inputs.write_text("\n".join(words(12)) + "\n")
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(job([inputs], whole))
    data = whole.read_bytes()
    for size in range(0, len(data), 293):
        for tail in (b"", b"\0" * 50):
            out.write_bytes(data[:size] + tail)
            said: list[str] = []
            figures = run(job([inputs], out), say=said.append)
            assert told(out) == told(whole)
            assert figures.skipped == data[:size].count(b"\n")
            torn = len((data[:size] + tail).rpartition(b"\n")[2])
            assert any(f"({torn} bytes): cut off" in line for line in said) == bool(torn)


def test_damage_in_the_middle_costs_its_own_lines_only(inputs: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(job([inputs], whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5][:40] + b"\0" * (len(lines[5]) - 41) + b"\n"
    out.write_bytes(b"".join(lines))
    said: list[str] = []
    figures = run(job([inputs], out), say=said.append)
    assert figures.done == 1
    assert "1 lines of out.jsonl are damaged: their items are done again" in said
    assert told(out) == told(whole)


class Stop(BaseException):
    pass


def after(count: int) -> Any:
    """A tick that ends the run at its `count`-th call, as Ctrl-C does."""
    left = iter(range(count))

    def tick() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return tick


@pytest.mark.parametrize("unordered", [False, True])
def test_interrupted_and_resumed(inputs: Path, tmp_path: Path, unordered: bool) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(job([inputs], out, unordered=unordered), tick=after(500))
    before = len(results(out))
    assert 0 < before < 200
    figures = run(job([inputs], out, unordered=unordered))
    assert (figures.skipped, figures.done) == (before, 200 - before)
    run(job([inputs], whole))
    assert sorted(told(out)) == sorted(told(whole))
    assert (told(out) == told(whole)) == (not unordered)


def test_equal_items_are_each_answered_once(inputs: Path, tmp_path: Path) -> None:
    inputs.write_text("abc\n" * 30 + "def\n")
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(job([inputs], out), tick=after(60))
    run(job([inputs], out))
    assert [r["line"] for r in results(out)] == list(range(1, 32))


def test_a_changed_input_is_noticed(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(job([inputs], out))
    lines = inputs.read_text().splitlines()
    changed = [*lines[:10], "aaaa", *lines[11:150], "bbbb", *lines[150:]]
    inputs.write_text("\n".join(changed) + "\n")
    said: list[str] = []
    figures = run(job([inputs], out), say=said.append)
    assert any("the input changed: 1 results are of items that are not in it any more" in line for line in said)
    assert figures.done == 2  # the others are known by their content, though they moved
    run(job([inputs], tmp_path / "whole.jsonl"))
    assert told(out) == told(tmp_path / "whole.jsonl")
    assert len(results(tmp_path / "out.jsonl.stale")) == 1


def test_an_input_that_changes_meanwhile_ends_the_run(inputs: Path, tmp_path: Path) -> None:
    mine = job([inputs], tmp_path / "out.jsonl")
    inputs.write_text("zzz\n" * 200)
    with pytest.raises(DsparkError, match=r"in.txt:1 changed while the run was on"):
        run(mine)


def test_other_settings_are_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    mine = job([inputs], out)
    run(mine)
    other = Job(**{**vars(mine), "settings": "other"})
    with pytest.raises(BadInput, match="was made with another model, template or other options"):
        run(other)
    assert len(results(out)) == 200


def test_a_file_of_somebody_else_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"prompt": "mine"}\n{"prompt": "too"}\n')
    with pytest.raises(BadInput, match="was not written by `dspark batch`"):
        run(job([inputs], out))
    assert out.read_text() == '{"prompt": "mine"}\n{"prompt": "too"}\n'


def test_two_runs_do_not_share_an_output(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out), pytest.raises(DsparkError, match=r"another `dspark batch` is writing .*out.jsonl"):
        run(job([inputs], out))
    run(job([inputs], out))
    assert len(results(out)) == 200


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of this process may have 40,000 bytes: the system refuses to write more, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_leaves_whole_results(inputs: Path, tmp_path: Path, small_disk: None) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(
        DsparkError, match=r"out.jsonl cannot be written: .*; the results that are in it are whole"
    ) as info:
        run(job([inputs], out))
    assert info.value.exit_code == 1
    assert "--resume" in (info.value.hint or "")
    kept = results(out)  # every line parses
    assert 30 < len(kept) < 200
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    run(job([inputs], out))
    run(job([inputs], tmp_path / "whole.jsonl"))
    assert told(out) == told(tmp_path / "whole.jsonl")


def test_no_room_to_put_results_in_order_loses_none(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "replace", full)
        with pytest.raises(DsparkError, match="No space left"):
            run(job([inputs], out))
    assert len(results(out)) == 200
    assert not list(tmp_path.glob("*.part"))
    figures = run(job([inputs], out))
    assert figures.skipped == 200
    assert [r["line"] for r in results(out)] == list(range(1, 201))


def test_a_sync_that_fails_ends_the_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may take a line and fail to keep it: the thread that syncs says so to the run."""

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal_module.os, "fsync", broken)
    with pytest.raises(DsparkError, match="Input/output error"):
        run(job([inputs], tmp_path / "out.jsonl"))


@pytest.mark.parametrize("place", ["/proc/nobody/out.jsonl", "/proc/out.jsonl"])
def test_a_place_that_cannot_be_written_is_said_before_anything_runs(inputs: Path, place: str) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc, where nobody may write")
    with pytest.raises(DsparkError, match=r"does not exist|cannot be written") as info:
        run(job([inputs], Path(place)))
    assert info.value.exit_code == 1
