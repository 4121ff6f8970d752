"""How many of the guesses were right: over the answer, and its course."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import Live
from dspark_cli.tui import draw
from dspark_cli.tui.section import Section


class Acceptance(Section):
    """Rate, tau, and a moving sparkline."""

    def __init__(self) -> None:
        super().__init__(3, title="Acceptance", id="acceptance")

    def update_from(self, live: Live | None) -> None:
        stats = live.stats if live else None
        if stats is None or not stats.verified:
            rate = Text("- (nothing was checked yet)", draw.DIM)
        else:
            rate = Text(f"{stats.acceptance_rate:.0%} ({stats.accepted} of {stats.verified} checked)")
        length = f"{stats.accepted_length:.2f} tokens a round" if stats and stats.rounds else "-"
        self.show(
            [
                draw.labelled("right", rate),
                draw.labelled("course", draw.sparkline(live.points if live else (), max(8, self.size.width - 10))),
                draw.labelled("tau", length),
            ]
        )
