"""Figures of a run, kept up to date round by round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.rounds import Round, Times
from dspark_cli.engine.stats import Stats

ENOUGH = 200  # rounds before speed is set against plain decoding


@dataclass
class Figures:
    """What a run did so far.

    total:       items of the input;  skipped: done by earlier runs;  failed: error lines of this one
    cached:      prompt tokens that were not computed because another sequence had them
    near_ties:   tokens whose first two logits were so close that another batch may have chosen otherwise
    costs:       of passes on this machine, to say what plain decoding would have taken; None if nothing is known
    """

    total: int
    skipped: int = 0
    done: int = 0
    failed: int = 0
    cached: int = 0
    near_ties: int = 0
    parallel: int = 1
    costs: CostModel | None = None
    stats: Stats = field(default_factory=Stats)
    clock: Callable[[], float] = time.perf_counter
    native_ms: float = 0.0
    began: float = field(init=False)
    _counted: int = 0
    _plain_ms: float = 0.0
    _spent_ms: float = 0.0
    _last: tuple[Times | None, float] = (None, 0.0)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def start(self, costs: CostModel | None) -> None:
        """The model is loaded: time counts from now."""
        self.costs, self.began = costs, self.clock()

    def add(self, item: Round, depth: int) -> None:
        """Count a round of a request that has `depth` tokens in its cache."""
        self.stats.add(item)
        self.cached += item.cached
        if item.is_prefill or item.beside or self.costs is None or item.error is not None:
            return
        if item.times is not self._last[0]:  # all rounds of one pass cost the same
            self._last = (item.times, self.costs.plain_ms(item.shared, depth))
        self._counted += 1
        self._plain_ms += self._last[1] / item.shared * len(item.tokens)
        self._spent_ms += item.times.total / item.shared

    @property
    def seconds(self) -> float:
        return self.clock() - self.began

    @property
    def tok_s(self) -> float:
        """Tokens produced a second over the whole run, prompts and everything included."""
        return self.stats.tokens / self.seconds if self.seconds else 0.0

    @property
    def against_plain(self) -> float | None:
        """Decoding speed over what plain decoding of as many sequences would reach, by the measured costs: an estimate.

        None until enough rounds were seen for it to mean something.
        """
        return self._plain_ms / self._spent_ms if self._counted >= ENOUGH and self._spent_ms else None

    @property
    def finished(self) -> int:
        return self.skipped + self.done + self.failed

    @property
    def left_s(self) -> float | None:
        """Seconds until the end, if the rest goes as this run went."""
        return self.seconds / self.done * (self.total - self.finished) if self.done else None

    def line(self) -> str:
        """The state in one line."""
        parts = [f"{self.finished} of {self.total} items"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        parts.append(f"{self.tok_s:.1f} tok/s")
        if self.against_plain is not None and self.stats.verified:
            parts.append(f"{self.against_plain:.2f}x plain (estimated)")
        if self.stats.verified:
            parts.append(f"{self.stats.acceptance_rate:.0%} accepted")
        if self.left_s is not None and self.finished < self.total:
            parts.append(f"{clock_text(self.left_s)} left")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The summary of `--json`."""
        figures = self.stats.as_dict()
        return {
            "items": self.total,
            "done": self.done,
            "failed": self.failed,
            "skipped": self.skipped,
            "parallel": self.parallel,
            "seconds": round(self.seconds, 3),
            "tok_s": round(self.tok_s, 2),
            "against_plain_estimate": None if self.against_plain is None else round(self.against_plain, 4),
            "prefill_tokens": self.stats.prefill_tokens,
            "cached_tokens": self.cached,
            "near_ties": self.near_ties,
            "overhead_ms_per_item": round(self.overhead_ms, 4),
            **{k: v for k, v in figures.items() if k not in ("survival", "conditional")},
        }

    @property
    def overhead_ms(self) -> float:
        """ms an item outside the native passes."""
        mine = self.done + self.failed
        return (self.seconds * 1e3 - self.native_ms) / mine if mine else 0.0


def clock_text(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
