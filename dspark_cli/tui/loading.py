"""The screen while the pair is found, downloaded, loaded and measured."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from dspark_cli.tui import draw
from dspark_cli.tui.opening import Stage

BAR = 40
LINES = 6


class LoadingScreen(ModalScreen[None]):
    """A line that says what goes on, a bar where the share is known, and the last lines worth reading."""

    BINDINGS = [("escape,ctrl+c,ctrl+q", "app.stop", "Cancel")]  # noqa: RUF012
    DEFAULT_CSS = """
    LoadingScreen { align: center middle; }
    LoadingScreen Vertical { width: 90%; max-width: 76; height: auto; border: round $accent; padding: 0 1; }
    LoadingScreen Vertical { background: $surface; }
    LoadingScreen Static { height: auto; }
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title
        self._said: list[str] = []

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(Text(self._title, "bold"))
            yield Static("", id="stage")
            yield Static("", id="bar")
            yield Static("", id="said")
            yield Static(Text("Esc cancels", "dim"))

    def stage(self, stage: Stage) -> None:
        self.query_one("#stage", Static).update(Text(stage.name))
        share = stage.share
        self.query_one("#bar", Static).update(
            Text() if share is None else draw.bar(share, BAR).append(f" {share:4.0%}")
        )

    def say(self, text: str) -> None:
        self._said = [*self._said, text][-LINES:]
        self.query_one("#said", Static).update(Text("\n".join(self._said), "dim"))
