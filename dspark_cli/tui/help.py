"""The help screen: keys and commands, from the one table; and what the panel shows."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from dspark_cli.tui.commands import COMMANDS, TYPING, Command

ABOUT = """\
A small drafter guesses the next tokens, the target checks all guesses in one pass. Right guesses are kept, so a pass gives
several tokens instead of one; the first wrong one is replaced by the target's own token, so the text is the one the target
would have written alone. Where guessing does not pay on this machine it is parked.

Colours (F3): green, underlined without colours, was guessed and kept; yellow, reversed without colours, is the target's
correction of a wrong guess; the rest the target made alone."""


class Help(ModalScreen[None]):
    """Any of its keys closes it."""

    BINDINGS = [("escape,f1,q,enter", "dismiss", "Close")]  # noqa: RUF012
    DEFAULT_CSS = """
    Help { align: center middle; }
    Help VerticalScroll { width: 90%; max-width: 92; height: 90%; border: round $accent; padding: 0 1; background: $surface; }
    Help Static { height: auto; }
    """

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(_text())

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()


def _text() -> Text:
    text = Text("Keys and commands (Esc closes this)\n\n", "bold")
    for command in COMMANDS:
        text.append(f"{key_words(command):8}", "bold").append(f"{_typed(command):24}").append(
            f"{command.help}\n", "dim"
        )
    text.append("\nTyping\n\n", "bold")
    for keys, what in TYPING:
        text.append(f"{keys}", "bold").append(f"  {what}\n", "dim")
    return text.append("\nWhat the panel shows\n\n", "bold").append(ABOUT)


def key_words(command: Command) -> str:
    """Its first key as people write it."""
    if not command.keys:
        return ""
    key = command.keys[0]
    if key == "escape":
        return "Esc"
    return f"Ctrl-{key[-1].upper()}" if key.startswith("ctrl+") else key.upper()


def _typed(command: Command) -> str:
    return f"/{command.name} {command.takes}".strip()
