"""The input: several lines, a history, and pastes that are too long to edit."""

from __future__ import annotations

import re
from collections.abc import Callable

from textual import events
from textual.strip import Strip
from textual.widgets import TextArea

from dspark_cli.tui.display import clean
from dspark_cli.tui.history import History
from dspark_cli.tui.messages import Scrolled, Sent
from dspark_cli.tui.words import size_of_text

#: a paste longer than this stands in the input as one short mark: wrapping it at every key would be slow, and nobody edits it
LONG_CHARACTERS, LONG_LINES = 2000, 20
_MARK = re.compile(r"\[pasted #(\d+): [^\]]*\]")


class Prompt(TextArea):
    """Posts Sent. `text` has marks where long pastes stand; `full_text` has the pastes themselves."""

    DEFAULT_CSS = """
    Prompt { height: auto; max-height: 10; min-height: 3; }
    """

    def __init__(self, history: History, *, id: str | None = None) -> None:
        super().__init__(
            id=id,
            soft_wrap=True,
            tab_behavior="focus",
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder="Ask something. F1 shows the keys.",
        )
        self._past = history
        self._pastes: dict[int, str] = {}

    def render_line(self, y: int) -> Strip:
        """Nothing where the window leaves no room: Textual cannot wrap a placeholder into no cells."""
        return super().render_line(y) if self.content_size.width > 1 else Strip.blank(self.size.width)

    @property
    def full_text(self) -> str:
        """What will be sent."""
        return _MARK.sub(lambda mark: self._pastes.get(int(mark[1]), mark[0]), self.text)

    def put(self, text: str) -> None:
        """Replace what stands there, cursor at the end. A long text becomes a mark."""
        self.load_text(self._short(text))
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        """Keys in the order they were typed: a binding of the app would overtake letters that still wait here."""
        own: dict[str, Callable[[], object]] = {
            "enter": self.send,
            **dict.fromkeys(("ctrl+j", "alt+enter", "shift+enter"), lambda: self.insert("\n")),
            "pageup": lambda: self.post_message(Scrolled(-1)),
            "pagedown": lambda: self.post_message(Scrolled(1)),
        }
        if event.key in own:
            event.stop()
            event.prevent_default()
            own[event.key]()
        else:
            await super()._on_key(event)

    def send(self) -> None:
        """Enter: send; after a backslash at the end of a line: a new line."""
        row, column = self.cursor_location
        if column and self.document[row][:column].endswith("\\"):
            self.replace("\n", (row, column - 1), (row, column), maintain_selection_offset=False)
            self.move_cursor((row + 1, 0))
            return
        text = self.full_text
        if text.strip():
            self.post_message(Sent(text))

    def sent(self) -> None:
        """The text was taken: remember it and start anew."""
        self._past.add(self.full_text)
        self._pastes.clear()
        self.load_text("")

    def action_cursor_up(self, select: bool = False) -> None:
        """Within the text; from its first line into the history."""
        if select or self.cursor_location[0] > 0 or not self.cursor_at_first_line:
            super().action_cursor_up(select)
            return
        self._recall(lambda: self._past.older(self.text))

    def action_cursor_down(self, select: bool = False) -> None:
        if select or not self.cursor_at_last_line:
            super().action_cursor_down(select)
            return
        self._recall(self._past.newer)

    def _recall(self, entry: Callable[[], str | None]) -> None:
        text = entry()
        if text is not None:
            self.put(text)

    async def _on_paste(self, event: events.Paste) -> None:
        """Insert what was pasted: without control characters, and as a mark if it is long."""
        event.stop()
        event.prevent_default()
        self.insert(self._short(clean(event.text.replace("\r\n", "\n").replace("\r", "\n"))))

    def _short(self, text: str) -> str:
        if len(text) <= LONG_CHARACTERS and text.count("\n") < LONG_LINES:
            return text
        number = len(self._pastes) + 1
        self._pastes[number] = text
        return f"[pasted #{number}: {size_of_text(text)}]"
