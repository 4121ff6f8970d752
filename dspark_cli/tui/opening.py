"""Loading a pair somewhere else than on the screen: what is told on the way, and how it is cancelled. No Textual."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dspark_cli.engine.session import Session
    from dspark_cli.registry.plan import MemoryPlan

TELL_EVERY_S = 0.1


class Cancelled(BaseException):
    """The user does not want it any more. Not an Exception: nothing on the way may take it for a failed download."""


@dataclass(frozen=True)
class Opened:
    """A loaded pair with its memory plan (None for an engine that has none)."""

    session: Session
    plan: MemoryPlan | None = None


@dataclass(frozen=True)
class Stage:
    """How far loading is. share: 0 to 1; None where nobody can say."""

    name: str
    share: float | None = None


class Progress:
    """Hears of downloads (it is a `registry.download.Report`), of loading and of measuring; raises Cancelled if asked to.

    tell:      gets a Stage now and then, and lines worth reading as str
    cancelled: is asked often
    """

    def __init__(
        self,
        tell: Callable[[Stage | str], None],
        cancelled: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._cancelled, self._clock = tell, cancelled, clock
        self._last: tuple[str, float] = ("", -1.0)
        self._file, self._have, self._total = "", 0, 0

    def stage(self, name: str, share: float | None = None) -> None:
        """Called from loading itself; a stage that repeats is told ten times a second at most."""
        if self._cancelled():
            raise Cancelled
        now = self._clock()
        if name != self._last[0] or now - self._last[1] >= TELL_EVERY_S or share == 1.0:
            self._last = (name, now)
            self._tell(Stage(name, share))

    # -- Report ------------------------------------------------------------------------------------------------------

    def expect(self, files: int, total: int, have: int) -> None:
        self._total, self._have = total, have
        self._tell(f"{files} file{'' if files == 1 else 's'} to download")

    def begin(self, name: str, total: int, have: int) -> None:
        self._file = name
        self._downloading()

    def advance(self, name: str, n_bytes: int) -> None:
        self._have += n_bytes
        self._downloading()

    def end(self, name: str) -> None:
        self._tell(f"{name}: here, hash checked")

    def say(self, text: str) -> None:
        self._tell(text)

    def _downloading(self) -> None:
        self.stage(f"downloading {self._file}", self._have / self._total if self._total else None)


class Opener(Protocol):
    """Loads the pair that was asked for, in whatever thread it is called."""

    @property
    def model(self) -> str:
        """As the user named it."""

    @property
    def drafter(self) -> str:
        """What was asked for last: a word or a path."""

    def open(self, progress: Progress) -> Opened:
        """Raises DsparkError, and what `progress` raises."""

    def switch(self, opened: Opened, drafter: str, policy: str | None, progress: Progress) -> Opened:
        """Another drafter or policy beside the loaded target. Raises DsparkError with everything as it was."""
