"""Downloads on stderr: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

import typer

from dspark_cli.cli.lines import NowAndThen
from dspark_cli.registry.plan import size


def make_report() -> Bars | Lines:
    """Bars on a terminal, else lines. A context manager."""
    return Bars() if sys.stderr.isatty() else Lines()


class Lines:
    """A line when a file begins, now and then, and when it ends."""

    def expect(self, files: int, total: int, have: int) -> None:
        here = f", {size(have)} of it here" if have else ""
        self._all, self._have_all = total, have
        self.say(f"{files} file{'' if files == 1 else 's'}, {size(total)}{here}")

    def __init__(self) -> None:
        self._name, self._total, self._have, self._lines = "", 0, 0, NowAndThen()
        self._all, self._have_all = 0, 0

    def begin(self, name: str, total: int, have: int) -> None:
        self._name, self._total, self._have, self._lines = name, total, have, NowAndThen()
        if have < total:
            self.say(f"{name}: {size(total)}" + (f", continuing at {size(have)}" if have else ""))

    def advance(self, name: str, n_bytes: int) -> None:
        self._have += n_bytes
        self._have_all += n_bytes
        if self._lines.due():
            share = f"{self._have / max(1, self._total):.0%}"
            whole = f", {self._have_all / self._all:.0%} of all" if self._all > self._total else ""
            self.say(f"{name}: {size(self._have)} of {size(self._total)} ({share}{whole})")

    def end(self, name: str) -> None:
        self.say(f"{name}: here, hash checked")

    def say(self, text: str) -> None:
        typer.echo(text, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


class Bars:
    """One bar a file and one in total."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}
        self._all: Any = None

    def expect(self, files: int, total: int, have: int) -> None:
        self._all = self._progress.add_task("total", total=total, completed=have)

    def begin(self, name: str, total: int, have: int) -> None:
        self._tasks[name] = self._progress.add_task(name, total=total, completed=have)

    def advance(self, name: str, n_bytes: int) -> None:
        self._progress.advance(self._tasks[name], n_bytes)
        if self._all is not None:
            self._progress.advance(self._all, n_bytes)

    def end(self, name: str) -> None:
        self._progress.stop_task(self._tasks[name])

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
