"""Bars, sparklines and blocks out of characters. No Textual: rich Texts in, nothing is measured or computed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from dspark_cli.engine.live import Block

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
ACCEPTED, REFUSED, UNCHECKED = "■", "□", "·"

GOOD, BAD, DIM, KEY = "green", "red", "dim", "bold"


def bar(share: float, width: int, style: str = GOOD) -> Text:
    """A bar of `width` cells, `share` of it (0 to 1) filled to an eighth of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return Text.assemble(("█" * full + (EIGHTHS[rest] if rest else ""), style)).append(
        " " * (width - full - (rest > 0))
    )


def sparkline(points: Sequence[float | None], width: int, style: str = GOOD) -> Text:
    """The last `width` points (0 to 1) as a line of blocks, newest at the right; `·` where there is none."""
    shown = list(points)[-width:]
    text = Text(" " * (width - len(shown)))
    for point in shown:
        if point is None:
            text.append(UNCHECKED, DIM)
        else:
            text.append(LEVELS[min(int(point * len(LEVELS)), len(LEVELS) - 1)], style)
    return text


def block_squares(block: Block, width: int) -> Text:
    """One square a drafted token: kept, checked and refused, not checked."""
    text = Text()
    for position in range(min(block.drafted, width)):
        if position < block.accepted:
            text.append(ACCEPTED, GOOD)
        elif position < block.verified:
            text.append(REFUSED, BAD)
        else:
            text.append(UNCHECKED, DIM)
    return text.append(" " * (width - text.cell_len))


def labelled(label: str, value: str | Text, width: int = 9) -> Text:
    """`label`, dim, in a column of `width`, then the value."""
    return Text.assemble((f"{label:<{width}}", DIM), value)


def fold(text: str, width: int, lines: int) -> list[Text]:
    """`text` in at most `lines` lines of `width` cells, cut with an ellipsis."""
    rows: list[str] = [""]
    for word in text.split():
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width:
            rows.append(word)
        else:
            rows[-1] = f"{rows[-1]} {word}".strip()
    if len(rows) > lines:
        rows = rows[:lines]
        rows[-1] = rows[-1][: width - 1] + "…"
    return [Text(row[:width]) for row in rows]
