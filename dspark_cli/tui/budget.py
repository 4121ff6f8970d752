"""How often the screen may be drawn while a model decodes. No Textual.

On a small machine every core computes tokens, and drawing takes its time from them; everywhere Python's lock is shared with
the decode loop. So the window pays for itself: it waits until what the last drawing cost is a small share of the time
that passed. A slow machine, a large window or a long code block draw less often, and decoding stays as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, thread_time

SHARE = 0.01  # of the time, for everything the UI thread does while decoding
SHORTEST_S, LONGEST_S = 0.12, 1.5
FIRST_COST_S = 0.01


@dataclass
class Budget:
    """`spent` is told by the UI thread each time it is about to draw; `interval` says how long to wait until the next.

    cpu, clock: seconds, of this thread and of the wall
    """

    share: float = SHARE
    cpu: Callable[[], float] = thread_time
    clock: Callable[[], float] = perf_counter
    interval: float = SHORTEST_S
    _cost: float = FIRST_COST_S
    _before: float | None = field(default=None)

    def start(self) -> None:
        """A new answer begins: what the UI thread did before does not count."""
        self._before = None

    def spent(self) -> None:
        """Called once a drawing, in the UI thread: everything since the last call was the price of that one."""
        now = self.cpu()
        if self._before is not None:
            cost = now - self._before
            # Quick to believe in a higher price, slow to believe in a lower one.
            self._cost = max(cost, 0.7 * self._cost + 0.3 * cost)
        self._before = now
        self.interval = min(max(self._cost / self.share, SHORTEST_S), LONGEST_S)
