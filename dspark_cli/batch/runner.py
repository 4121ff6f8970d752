"""The run itself: items to requests, rounds to results, results to the journal."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import DsparkError
from dspark_cli.batch.earlier import Known, take_up
from dspark_cli.batch.inputs import ReadOptions, read_items
from dspark_cli.batch.items import Item, PromptOptions, request_of
from dspark_cli.batch.journal import Entry, Journal
from dspark_cli.batch.output import Output
from dspark_cli.batch.progress import Figures
from dspark_cli.engine.answer import Answer, as_json
from dspark_cli.engine.rounds import Request, Round
from dspark_cli.engine.session import Session

#: Logits closer than this may swap between runs that decode several sequences: where a sequence's tokens lie in the shared
#: cache decides in which order attention adds them up, and quantized activations make much of the last bit. Measured on the
#: embedded model (tests/measure_neighbours.py, bench.parallel): up to 0.6 as Q4_1, 0.78 as Q8_0, 0.03 as F16.
BATCH_NEAR_TIE = {"F32": 0.1, "F16": 0.1, "BF16": 0.3}
QUANTIZED_NEAR_TIE = 1.0


@dataclass(frozen=True)
class Job:
    """What is to be done. known: all items of `files`, as `earlier.scan` saw them."""

    files: Sequence[Path]
    known: Sequence[Known]
    reading: ReadOptions
    prompting: PromptOptions
    output: Output
    settings: str
    fail_fast: bool = False


def settings_of(model: Path, reading: ReadOptions, prompting: PromptOptions) -> str:
    """Hash of all that an answer depends on beside its item. Drafter, policy and neighbours change no answer."""
    said = {"model": model.name, "bytes": model.stat().st_size, **vars(reading), **prompting.as_dict()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def run_job(
    job: Job,
    open_session: Callable[[], Session],
    figures: Figures,
    *,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
    retry_errors: bool = False,
) -> bool:
    """Do what is missing of `job`; returns whether every item has an answer. The model is loaded only if it is needed.

    say: is told, in a line, what the user should know;  tick: is called after every round
    Raises DsparkError when results cannot be kept, for a foreign or locked output, and for --fail-fast.
    """
    with Journal(job.output.journal) as journal:
        done = take_up(journal, job.known, job.settings, say, retry_errors=retry_errors)
        figures.skipped = len(done)
        if done:
            say(f"{len(done)} of {len(job.known)} items are done already")
        run = Run(job, journal, done, figures, tick)
        if len(done) < len(job.known):
            with open_session() as session:
                figures.start(session.costs if session.policy == "auto" else None)
                run.work(session)
        run.finish()
        return not any(entry.failed for entry in done.values())


@dataclass
class Open:
    """An item that is being answered.

    near: logits closer than this are a near-tie;  ties: [characters before it, margin] of tokens that were one
    """

    item: Item
    request: Request
    near: float
    answer: Answer = field(default_factory=Answer)
    ties: list[tuple[int, float]] = field(default_factory=list)

    def add(self, item: Round) -> None:
        if item.margins is not None:
            at = len(self.answer.text)
            self.ties += [(at, round(m, 4)) for m in item.margins if m < self.near]
        self.answer.add(item)

    @property
    def depth(self) -> int:
        return len(self.request.prompt) + len(self.answer.tokens)


class Run:
    """One run over a job. `done`: item number -> its result, of earlier runs and then of this one."""

    def __init__(
        self,
        job: Job,
        journal: Journal,
        done: dict[int, Entry],
        figures: Figures,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.job, self.journal, self.done, self.figures, self._tick = job, journal, done, figures, tick
        self._open: dict[int, Open] = {}
        self._left = Counter(item.file for n, item in enumerate(job.known) if n not in done)
        self._first: dict[str, int] = {}  # input file -> its first item
        for number, known in enumerate(job.known):
            self._first.setdefault(known.file, number)
        self._names = job.output.names(job.files, job.reading) if job.output.kind == "folder" else {}

    def work(self, session: Session) -> None:
        """Answer everything that is not done. Raises DsparkError when results cannot be kept, or for --fail-fast."""
        native = session.target.native_ms
        rounds = session.run_all(self._requests(session), margins=True, isolate=True)
        for item in rounds:
            mine = self._open[item.request]
            mine.add(item)
            self.figures.add(item, mine.depth)
            self.figures.native_ms = session.target.native_ms - native + self.figures.stats.draft_ms
            if item.error is not None:
                self._fail(self._open.pop(item.request).item, item.error)
            elif item.finish:
                self._succeed(session, self._open.pop(item.request))
            self._tick()

    def finish(self) -> None:
        """Put the output in its final form: order, CSV, files of the folder that earlier runs left out."""
        for file in map(str, self.job.files):
            if self._names and not self._left[file] and not self._names[Path(file)].exists():
                self._write_file(file)
        self.job.output.finish(self.journal, self.done, self.job.files, self.job.reading)

    def _requests(self, session: Session) -> Iterator[Request]:
        """Items that are not done, as the engine has room for them. Those that make no request become error lines."""
        for item in read_items(self.job.files, self.job.reading):
            if item.number >= len(self.job.known) or item.key != self.job.known[item.number].key:
                raise DsparkError(
                    f"{item.file}:{item.line} changed while the run was on", hint="the same with --resume"
                )
            if item.number in self.done:
                continue
            try:
                if item.error is not None:
                    raise DsparkError(item.error)
                request = request_of(item, session, self.job.prompting)
            except DsparkError as error:
                self._fail(item, error)
                self._tick()
                continue
            near = BATCH_NEAR_TIE.get(session.target.info.format, QUANTIZED_NEAR_TIE)
            self._open[item.number] = Open(item, request, near)
            yield request

    def _succeed(self, session: Session, mine: Open) -> None:
        result = {**as_json(session, mine.request, mine.answer), "near_ties": mine.ties}
        self.figures.done += 1
        self.figures.near_ties += len(mine.ties)
        self._keep(mine.item, result, failed=False)

    def _fail(self, item: Item, error: DsparkError) -> None:
        self.figures.failed += 1
        self._keep(item, {"finish_reason": "error", "error": str(error)}, failed=True)
        if self.job.fail_fast:
            raise DsparkError(f"{item.file}:{item.line}: {error}", hint=error.hint)

    def _keep(self, item: Item, result: dict[str, Any], *, failed: bool) -> None:
        place = item.place()
        offset, size = self.journal.append({**place, "settings": self.job.settings, **result})
        entry = Entry(offset, size, item.key, place["file"], item.line, failed, self.job.settings)
        self.done[item.number] = entry
        self._left[place["file"]] -= 1
        if self._names and not self._left[place["file"]]:
            self._write_file(place["file"])

    def _write_file(self, file: str) -> None:
        first, known = self._first.get(file, 0), self.job.known
        mine = takewhile(lambda n: known[n].file == file, range(first, len(known)))
        entries = [self.done[number] for number in mine]
        self.job.output.file_done(self.journal, Path(file), entries, self._names[Path(file)], self.job.reading)
