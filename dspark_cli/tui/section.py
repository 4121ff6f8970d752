"""A few lines of text that change often: only those that did are drawn, and nothing is laid out again."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget


class Section(Widget):
    """Shows `lines`, one a row; its height is fixed by its style."""

    DEFAULT_CSS = "Section { height: auto; }"

    def __init__(self, rows: int, *, title: str = "", id: str | None = None) -> None:
        super().__init__(id=id)
        self._style: Style | None = None
        self._shown: list[Text] = []
        self._strips: list[Strip] = []
        self._title = title
        self.styles.height = rows + bool(title)

    def show(self, lines: Sequence[Text]) -> None:
        """Replace the lines; rows that stay as they were are not drawn."""
        rows = [Text(self._title, "bold"), *lines] if self._title else list(lines)
        console = self.app.console
        for y in range(max(len(rows), len(self._shown))):
            new = rows[y] if y < len(rows) else Text()
            old = self._shown[y] if y < len(self._shown) else None
            if old == new and old is not None and old.style == new.style:
                continue
            self._put(y, _strip(new, console))
            self.refresh(Region(0, y, self.size.width, 1))
        self._shown = rows

    def _put(self, y: int, strip: Strip) -> None:
        if y < len(self._strips):
            self._strips[y] = strip
        else:
            self._strips.append(strip)

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._style = None

    def _base(self) -> Style:
        """`rich_style`, which takes a walk through all parents, once for all lines."""
        if self._style is None:
            self._style = self.rich_style
        return self._style

    def render_line(self, y: int) -> Strip:
        width, style = self.size.width, self._base()
        if y >= len(self._strips):
            return Strip.blank(width, style)
        return self._strips[y].crop_extend(0, width, style).apply_style(style)


def _strip(text: Text, console: Console) -> Strip:
    return Strip([segment for segment in text.render(console) if segment.text])
