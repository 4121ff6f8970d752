"""Runs answers and races in whatever thread calls it, never two at once. No Textual."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

from dspark_cli.backends.errors import DsparkError
from dspark_cli.engine.live import Race
from dspark_cli.engine.rounds import Request, Round
from dspark_cli.engine.session import Session, first_difference
from dspark_cli.engine.stats import Stats
from dspark_cli.tui.budget import Budget


class Stopped(BaseException):
    """Raised inside a prefill that the user does not want any more."""


@dataclass
class Decoder:
    """The one place that touches the engine once it is loaded.

    cancelled: asked between rounds and between passes over a prompt
    """

    budget: Budget
    clock: Callable[[], float] = perf_counter
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else decodes, loads or frees meanwhile. Raises DsparkError at once when somebody does."""
        if not self._lock.acquire(blocking=False):
            raise DsparkError("the model is still busy", hint="Esc stops it")
        try:
            yield
        finally:
            self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Until nobody uses the engine; False if that takes longer."""
        if not self._lock.acquire(timeout=seconds):
            return False
        self._lock.release()
        return True

    def answer(
        self,
        session: Session,
        request: Request,
        *,
        tell: Callable[[list[Round]], object],
        prefill: Callable[[int, int], object],
        cancelled: Callable[[], bool],
    ) -> bool:
        """Decode `request`; `tell` gets its rounds in batches, as often as the budget allows. Returns whether it was stopped.

        Raises what the engine raises, after the rounds that were done have been told.
        """
        with self.alone(), _stoppable(session, prefill, cancelled):
            rounds = session.run(request)
            batch: list[Round] = []
            last = self.clock()
            try:
                for item in rounds:
                    batch.append(item)
                    now = self.clock()
                    if item.is_prefill or now - last >= self.budget.interval:
                        tell(batch)
                        batch, last = [], now
                    if cancelled():
                        return not item.finish
                return False
            except Stopped:
                return True
            finally:
                rounds.close()  # type: ignore[attr-defined]
                if batch:
                    tell(batch)

    def race(
        self,
        session: Session,
        request: Request,
        tokens: list[int],
        speculative: Stats,
        *,
        moved: Callable[[Stats], object],
        cancelled: Callable[[], bool],
    ) -> Race | None:
        """Decode the same `tokens` plainly; `moved` hears how far. None when it was stopped."""
        with self.alone(), _stoppable(session, lambda done, total: None, cancelled):
            plain = Stats()
            ids: list[int] = []
            margins: list[float] = []
            last = self.clock()
            rounds = session.run(replace(request, max_tokens=len(tokens)), plain=True, margins=True)
            try:
                for item in rounds:
                    plain.add(item)
                    ids += item.tokens
                    margins += item.margins or ()
                    if self.clock() - last >= self.budget.interval:
                        last = self.clock()
                        moved(replace(plain))
                    if cancelled():
                        return None
            except Stopped:
                return None
            finally:
                rounds.close()  # type: ignore[attr-defined]
        first = first_difference(tokens, ids)
        margin = margins[first] if first is not None and first < len(margins) else None
        return Race(speculative, plain, first, margin)


@contextmanager
def _stoppable(session: Session, told: Callable[[int, int], object], cancelled: Callable[[], bool]) -> Iterator[None]:
    """Meanwhile, reading a prompt is told of, and ends with Stopped when the user does not want it any more."""

    def call(done: int, total: int) -> None:
        if cancelled():
            raise Stopped
        told(done, total)

    session.on_prefill(call)
    try:
        yield
    finally:
        session.on_prefill(lambda done, total: None)
