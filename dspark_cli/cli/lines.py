"""Progress where there is no terminal: a line now and then."""

from __future__ import annotations

import time

EVERY_S = 10.0


class NowAndThen:
    """Says whether it is time for the next line."""

    def __init__(self, every: float = EVERY_S) -> None:
        self._every, self._said = every, time.monotonic()

    def due(self) -> bool:
        """True at most once in `every` seconds; asking takes the turn."""
        now = time.monotonic()
        if now - self._said <= self._every:
            return False
        self._said = now
        return True
