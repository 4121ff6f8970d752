"""Whether speculation is on, and why, in plain words."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import Live
from dspark_cli.tui import draw, words
from dspark_cli.tui.section import Section

LINES = 4
DOTS = {"speculating": "green", "parked": "yellow", "not worth checking": "yellow"}


class State(Section):
    """A word and an explanation."""

    def __init__(self) -> None:
        super().__init__(LINES + 2, title="Speculation", id="state")

    def update_from(self, live: Live | None, drafter: str | None, policy: str) -> None:
        doing = words.doing(live, drafter, policy)
        dot = Text.assemble(("● ", DOTS.get(doing, draw.DIM)), (doing, draw.KEY))
        source = live.last.source if live and live.last and live.last.source else drafter or "none"
        rows = [dot, Text(f"drafter {source}, policy {policy}", draw.DIM)]
        width = max(20, self.size.width)
        self.show([*rows, *draw.fold(words.explain(live, drafter, policy), width, LINES)])
