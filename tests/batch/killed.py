"""Batch runs over a tiny table target, and a process that kills them: python killed.py INPUT OUT KILLS.

The target is slowed down so that a kill falls anywhere in a run. Prints how many results there were at each death.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))

from dspark_cli.backends.base import Row, RowOutput
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.batch.earlier import scan
from dspark_cli.batch.inputs import ReadOptions, find_files, read_items
from dspark_cli.batch.items import PromptOptions
from dspark_cli.batch.output import Output
from dspark_cli.batch.progress import Figures
from dspark_cli.batch.runner import Job, run_job
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.schedule import Fixed
from dspark_cli.engine.session import Session
from fakes import TableTarget


class Slow(TableTarget):
    ms = 0.0

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        time.sleep(self.ms / 1e3)
        return super().step(rows)


def session(ms: float = 0.0, *, n_seq: int = 4, n_ctx: int = 64) -> Session:
    target = Slow(26, seed=3, n_seq=n_seq, n_ctx=n_ctx, spread=3.0)
    target.ms = ms
    return Session(target, LookupDrafter(block_size=4), Fixed(3))


def job(
    inputs: list[Path], out: Path, reading: ReadOptions | None = None, *, folder: bool = False, **options: object
) -> Job:
    """`prompting` and the fields of Job may be given."""
    reading = reading or ReadOptions()
    prompting = options.pop("prompting", PromptOptions(SamplingOptions(), 12, raw=True))
    output = Output.of(
        None if folder else out, out if folder else None, unordered=bool(options.pop("unordered", False))
    )
    files = find_files([str(p) for p in inputs], reading, never=[output.journal, output.path])
    resume = bool(options.pop("resume", True))
    output.check(files, reading, resume=resume)
    known = scan(read_items(files, reading))
    return Job(files, known, reading, prompting, output, "table", **options)  # type: ignore[arg-type]


def kill_often(mine: Job, ms: float, kills: int, seed: int) -> list[int]:
    """Run `mine` in children that are killed at random moments, `kills` times, then once to its end.

    Returns, for every child that was killed before it ended, how many results there were then.
    """
    random, found = Random(seed), []
    for life in itertools.count():
        child = os.fork()
        if child == 0:
            os._exit(0 if run_job(mine, lambda: session(ms), Figures(len(mine.known))) else 1)
        if life < kills:
            _wait(mine.output.journal, _lines(mine.output.journal) + random.randrange(3))
            time.sleep(random.uniform(0.0, 0.004))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            found.append(_lines(mine.output.journal))
        if life >= kills:
            assert os.waitstatus_to_exitcode(status) == 0
            return found
    raise AssertionError


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait(path: Path, lines: int, seconds: float = 2.0) -> None:
    """Until `path` has that many lines; not for ever, as the run may end before."""
    end = time.monotonic() + seconds
    while _lines(path) < lines and time.monotonic() < end:
        time.sleep(0.0005)


if __name__ == "__main__":
    print(*kill_often(job([Path(sys.argv[1])], Path(sys.argv[2])), 1.0, int(sys.argv[3]), seed=0))
