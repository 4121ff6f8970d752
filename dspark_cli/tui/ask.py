"""A dialog of one line: a command asks for its argument."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label

from dspark_cli.tui.commands import Command
from dspark_cli.tui.messages import Asked


class Ask(ModalScreen[None]):
    """Enter posts Asked to the app, Escape forgets it."""

    BINDINGS = [("escape", "dismiss", "Cancel")]  # noqa: RUF012
    DEFAULT_CSS = """
    Ask { align: center middle; }
    Ask Vertical { width: 80%; max-width: 72; height: auto; border: round $accent; padding: 0 1; background: $surface; }
    """

    def __init__(self, command: Command, value: str) -> None:
        super().__init__()
        self._command, self._value = command, value

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Label(f"{self._command.name}: {self._command.help}")
            yield Input(self._value, placeholder=self._command.takes)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss()
        self.app.post_message(Asked(self._command, event.value))
