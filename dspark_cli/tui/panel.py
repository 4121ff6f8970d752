"""The live panel beside the conversation: a stack of sections."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll

from dspark_cli.tui.acceptance import Acceptance
from dspark_cli.tui.blocks import Blocks
from dspark_cli.tui.memory import Memory
from dspark_cli.tui.positions import Positions
from dspark_cli.tui.speed import Speed
from dspark_cli.tui.state import State
from dspark_cli.tui.watching import Watching


class Panel(VerticalScroll):
    """Shows what `Watching` knows."""

    can_focus = False
    DEFAULT_CSS = """
    Panel { width: 42; max-width: 60%; padding: 0 1; scrollbar-size-vertical: 1; }
    Panel Section { margin-bottom: 1; }
    """

    def compose(self) -> ComposeResult:
        yield Speed()
        yield State()
        yield Acceptance()
        yield Positions()
        yield Blocks()
        yield Memory()

    def __init__(self, watching: Watching) -> None:
        super().__init__()
        self._watching = watching

    def on_resize(self) -> None:
        self.update()

    def update(self) -> None:
        """As of now, if it is on the screen."""
        w = self._watching
        if not self.display:
            return
        self.query_one(Speed).update_from(w)
        self.query_one(State).update_from(w.live, w.drafter, w.policy)
        self.query_one(Acceptance).update_from(w.live)
        self.query_one(Positions).update_from(w.live)
        self.query_one(Blocks).update_from(w.live)
        self.query_one(Memory).update_from(w.live, w.n_ctx, w.plan)
