"""The last blocks, one row a round: drafted, checked, kept."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import Live
from dspark_cli.tui import draw
from dspark_cli.tui.section import Section

ROWS = 5
SQUARES = 18


class Blocks(Section):
    """Newest at the bottom. Without a draft there is nothing to show, and it says so."""

    def __init__(self) -> None:
        super().__init__(ROWS + 1, title="Last blocks: drafted/checked/kept", id="blocks")

    def update_from(self, live: Live | None) -> None:
        blocks = list(live.blocks)[-ROWS:] if live else []
        rows = [
            draw.block_squares(block, SQUARES).append(f" {block.drafted}/{block.verified}/{block.accepted}", draw.DIM)
            for block in blocks
        ]
        if not rows:
            rows = [Text("no block was drafted in this answer", draw.DIM)]
        legend = Text.assemble(
            (draw.ACCEPTED, draw.GOOD), " kept  ", (draw.REFUSED, draw.BAD), " refused  ", draw.UNCHECKED, " unchecked"
        )
        self.show([*rows, *[Text()] * (ROWS - len(rows)), legend])
