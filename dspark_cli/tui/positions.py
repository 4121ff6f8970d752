"""Acceptance by position in the block: later guesses are harder."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import Live
from dspark_cli.tui import draw
from dspark_cli.tui.section import Section

ROWS = 8


class Positions(Section):
    """A bar a position: of the rounds that checked it, the share that kept it (survival@i)."""

    def __init__(self) -> None:
        super().__init__(ROWS, title="Kept, by position in the block", id="positions")

    def update_from(self, live: Live | None) -> None:
        survival = live.stats.survival[:ROWS] if live else []
        counts = live.stats.verified_at if live else []
        rows = [
            draw.labelled(f"{i}", draw.bar(rate, 18), 3)
            .append(f" {rate:4.0%}")
            .append(f" of {counts[i - 1]}", draw.DIM)
            for i, rate in enumerate(survival, start=1)
        ]
        self.show(rows or [Text("nothing was checked in this answer", draw.DIM)])
