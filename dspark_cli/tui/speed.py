"""Tokens per second: now, over the answer, and what plain decoding does here."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import times_plain
from dspark_cli.tui import draw
from dspark_cli.tui.section import Section
from dspark_cli.tui.watching import Watching
from dspark_cli.tui.words import race_result

BAR = 16


class Speed(Section):
    """Bars of one scale, so that their lengths compare."""

    def __init__(self) -> None:
        super().__init__(6, title="Speed, tokens per second", id="speed")

    def update_from(self, w: Watching) -> None:
        now = w.live.now.decode_tok_s if w.live else 0.0
        plain = w.plain_tok_s or 0.0
        top = max(now, w.tok_s, plain, 1e-9)
        raced = w.race or w.runner
        how = "raced just now" if raced else "by measured costs" if plain else "unknown, F4 races"
        self.show(
            [
                _row("now", now, top, draw.GOOD),
                _row("answer", w.tok_s, top, draw.GOOD),
                _row("plain", plain, top, "blue"),
                draw.labelled("", Text(f"plain: {how}", draw.DIM)),
                draw.labelled("ratio", _ratio(times_plain(w.tok_s, plain))),
                draw.labelled("race", _race(w)),
            ]
        )


def _row(label: str, tok_s: float, top: float, style: str) -> Text:
    return draw.labelled(label, Text(f"{tok_s:6.1f} " if tok_s else "     - ")).append_text(
        draw.bar(tok_s / top, BAR, style)
    )


def _race(w: Watching) -> str:
    if w.race:
        return race_result(w.race)
    return f"plain is at {w.runner.tokens} tokens" if w.runner else "F4"


def _ratio(ratio: float | None) -> Text:
    if ratio is None:
        return Text("-")
    return Text(f"{ratio:.2f}x plain", draw.GOOD if ratio >= 1 else "yellow")
