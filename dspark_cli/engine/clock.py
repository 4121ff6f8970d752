"""Where the time of a pass went."""

from __future__ import annotations

from collections.abc import Callable

from dspark_cli.backends.base import Drafter, Target
from dspark_cli.engine.rounds import Times


class PassClock:
    """Splits a pass into native time and overhead: native time of the target is `verify`, the drafter's call is `draft`.

    Features that the drafter took in only now, because it was parked before, count as `inject`.
    """

    def __init__(self, target: Target, drafter: Drafter | None, clock: Callable[[], float]) -> None:
        self._target, self._drafter, self._clock = target, drafter, clock
        self._native, self._delayed = self._counters()
        self._began = self._last = clock()
        self._laps: dict[str, float] = {}
        self._injected_ms = 0.0

    def _counters(self) -> tuple[float, float]:
        return self._target.native_ms, self._drafter.inject_ms if self._drafter is not None else 0.0

    def lap(self, name: str) -> None:
        now = self._clock()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def injected(self, began: float) -> None:
        """From `began` until now the drafter took in what was committed."""
        self._injected_ms += (self._clock() - began) * 1e3

    def split(self, prompts: float) -> tuple[Times, float]:
        """(times of the draft-verify cycle, ms of the prompts beside it); `prompts`: their share of the pass's tokens."""
        total = (self._clock() - self._began) * 1e3
        native, delayed = self._counters()
        verify, delayed = native - self._native, delayed - self._delayed
        draft = max(0.0, self._laps["draft"] - delayed)
        inject = self._injected_ms + delayed
        own = max(0.0, total - draft - verify - inject)
        if prompts == 1.0:  # nobody decodes
            return Times(), total
        return Times(draft, verify * (1 - prompts), inject, own * (1 - prompts)), (verify + own) * prompts
