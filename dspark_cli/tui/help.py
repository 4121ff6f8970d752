"""The help screen: keys and commands, from the one table; and what the panel shows."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from dspark_cli.tui.commands import COMMANDS, TYPING, Command

ABOUT = (
    "A small drafter guesses the next tokens, the target checks all guesses in one pass. Right guesses are kept, so a pass "
    "gives several tokens instead of one; the first wrong one is replaced by the target's own token, so the text is the one "
    "the target would have written alone. Where guessing does not pay on this machine it is parked.",
    "Colours (F3): green, underlined without colours, was guessed and kept; yellow, reversed without colours, is the "
    "target's correction of a wrong guess; the rest the target made alone.",
)


class Help(ModalScreen[None]):
    """Any of its keys closes it."""

    BINDINGS = [("escape,f1,q,enter,ctrl+c", "dismiss", "Close")]  # noqa: RUF012
    DEFAULT_CSS = """
    Help { align: center middle; }
    Help VerticalScroll { width: 90%; max-width: 92; height: 90%; border: round $accent; padding: 0 1; background: $surface; }
    Help Static { height: auto; }
    """

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(_contents())

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()


def _contents() -> Group:
    table = Table.grid(padding=(0, 2))
    for command in COMMANDS:
        table.add_row(Text(key_words(command), "bold"), _typed(command), Text(command.help, "dim"))
    typing = Table.grid(padding=(0, 2))
    for keys, what in TYPING:
        typing.add_row(Text(keys, "bold"), Text(what, "dim"))
    keys_title, about_title = _title("Keys and commands (Esc closes this)"), _title("What the panel shows")
    return Group(keys_title, table, _title("Typing"), typing, about_title, Text("\n\n".join(ABOUT)))


def _title(text: str) -> Text:
    return Text(f"\n{text}\n", "bold")


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
