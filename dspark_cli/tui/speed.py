"""Tokens per second: now, over the answer, and what plain decoding does here."""

from __future__ import annotations

from rich.text import Text

from dspark_cli.engine.live import Live, Race, times_plain
from dspark_cli.engine.stats import Stats
from dspark_cli.tui import draw
from dspark_cli.tui.section import Section
from dspark_cli.tui.words import race_result

BAR = 16


class Speed(Section):
    """Bars of one scale, so that their lengths compare."""

    def __init__(self) -> None:
        super().__init__(6, title="Speed, tokens per second", id="speed")

    def update_from(
        self,
        live: Live | None,
        plain_tok_s: float | None,
        *,
        race: Race | None = None,
        runner: Stats | None = None,
    ) -> None:
        """plain_tok_s: from the cost model, None where it measured nothing. runner: plain decoding in a race going on."""
        now = live.now.decode_tok_s if live else 0.0
        answer = live.stats.decode_tok_s if live else 0.0
        raced = race.plain if race else runner
        plain = (raced.decode_tok_s if raced else plain_tok_s) or 0.0
        top = max(now, answer, plain, 1e-9)
        how = "raced" if raced else "by measured costs" if plain_tok_s else "not measured: F4 races"
        rows = [
            _row("now", now, top, draw.GOOD),
            _row("answer", answer, top, draw.GOOD),
            _row("plain", plain, top, "blue"),
            draw.labelled("", Text(f"plain is {how}", draw.DIM)),
            draw.labelled("ratio", _ratio(times_plain(answer, plain))),
            draw.labelled("race", race_result(race) if race else "plain is decoding..." if runner else "F4"),
        ]
        self.show(rows)


def _row(label: str, tok_s: float, top: float, style: str) -> Text:
    return draw.labelled(label, Text(f"{tok_s:6.1f} " if tok_s else "     - ")).append_text(
        draw.bar(tok_s / top, BAR, style)
    )


def _ratio(ratio: float | None) -> Text:
    if ratio is None:
        return Text("-")
    return Text(f"{ratio:.2f}x plain", draw.GOOD if ratio >= 1 else "yellow")
