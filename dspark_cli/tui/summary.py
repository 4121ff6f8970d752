"""The panel in two lines, for windows that are too narrow for it."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import times_plain
from dspark_cli.tui import draw, words
from dspark_cli.tui.section import Section
from dspark_cli.tui.watching import Watching


class Summary(Section):
    """Speed against plain; acceptance, the last block, and what speculation does."""

    def __init__(self, watching: Watching) -> None:
        super().__init__(2, id="summary")
        self._watching = watching

    def on_resize(self) -> None:
        self.update()

    def update(self) -> None:
        """As of now, if it is on the screen."""
        if self.display:
            self.show([_speed(self._watching), _acceptance(self._watching)])


def _speed(w: Watching) -> Text:
    live = w.live
    text = Text()
    if live is not None and live.stats.rounds:
        text.append(f"{live.now.decode_tok_s:.0f}", draw.KEY).append(
            f" tok/s now, {live.stats.decode_tok_s:.0f} answer"
        )
    else:
        text.append("- tok/s", draw.DIM)
    if w.plain_tok_s:
        text.append(f", plain {w.plain_tok_s:.0f}")
    ratio = times_plain(w.tok_s, w.plain_tok_s)
    if ratio:
        text.append(f" = {ratio:.2f}x", draw.GOOD if ratio >= 1 else "yellow")
    if w.race:
        text.append(" identical" if w.race.identical else " differs")
    elif w.runner:
        text.append(f", race: plain at {w.runner.tokens} tokens")
    return text.append(f"  ctx {live.context_used if live else 0}/{w.n_ctx}", draw.DIM)


def _acceptance(w: Watching) -> Text:
    live = w.live
    stats = live.stats if live else None
    rate = f"{stats.acceptance_rate:.0%}" if stats and stats.verified else "-"
    text = Text.assemble(("acceptance ", draw.DIM), f"{rate:>4} ").append_text(
        draw.sparkline(live.points if live else (), 12)
    )
    if live and live.blocks:
        text.append(" ").append_text(draw.block_squares(live.blocks[-1], 8))
    doing = words.doing(live, w.drafter, w.policy)
    reason = f": {live.reason}" if live and doing == words.TITLES["parked"] and live.reason else ""
    return text.append(f" {doing}{reason}", draw.KEY).append(f" ({w.drafter or 'no drafter'})", draw.DIM)
