"""The conversation on the screen. It scrolls by itself, without a layout: an answer grows ten times a second."""

from __future__ import annotations

from collections.abc import Callable

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from dspark_cli.tui.display import Look
from dspark_cli.tui.display import Transcript as Lines

WHEEL = 3


class Transcript(Widget):
    """Draws the lines of `turns`; follows the end of the conversation until the user scrolls up.

    look: what the lines should look like at a width, as of now
    """

    DEFAULT_CSS = """
    Transcript { height: 1fr; }
    """

    def __init__(self, look: Callable[[int], Look], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.content = Lines()
        self._look = look
        self._height = 0
        self._top = 0
        self._follow = True
        self._style: Style | None = None

    @property
    def top(self) -> int:
        """The first line shown."""
        return self._top

    def changed(self, *, follow: bool = False) -> None:
        """The turns, or their look, changed. follow: go to the end, wherever the user is."""
        if not self.size.width:
            return  # drawn when it gets its size
        self._follow = self._follow or follow
        self._height = self.content.layout(self._look(self.size.width - 1))
        self._scroll(self._bottom() if self._follow else self._top)
        self.refresh()

    def grown(self) -> None:
        """The last turn got longer: what stands before it stays."""
        if not self.size.width or not self.content.turns:
            return
        top = self._top
        self._height = self.content.layout(self._look(self.size.width - 1))
        self._scroll(self._bottom() if self._follow else self._top)
        first = 0 if self._top != top else max(0, self.content.first_changed - self._top)
        if first < self.size.height:
            self.refresh(Region(0, first, self.size.width, self.size.height - first))

    def scroll_lines(self, lines: int) -> None:
        """By the user: up (negative) stops following, the end follows again."""
        self._scroll(self._top + lines)
        self._follow = self._top >= self._bottom()
        self.refresh()

    def scroll_pages(self, pages: float) -> None:
        self.scroll_lines(round(pages * max(1, self.size.height - 1)))

    def _bottom(self) -> int:
        return max(0, self._height - self.size.height)

    def _scroll(self, top: int) -> None:
        self._top = max(0, min(top, self._bottom()))

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
        strip = Strip(self.content.line(self._top + y)).crop_extend(0, width - 1, style).apply_style(style)
        return Strip([*strip, *Strip([self._mark(y)]).apply_style(style)], width) if width else strip

    def _mark(self, y: int) -> Segment:
        """The last column: where in the conversation this is."""
        rows, height = self.size.height, self._height
        if height <= rows:
            return Segment(" ")
        begin = self._top * rows // height
        end = max(begin + 1, (self._top + rows) * rows // height)
        return Segment("▐" if begin <= y < end else " ", Style(dim=True))

    def on_resize(self, _: events.Resize) -> None:
        self.changed()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.scroll_lines(-WHEEL)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.scroll_lines(WHEEL)
