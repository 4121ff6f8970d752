"""The window of `dspark chat`: what is on the screen, what the user is told, how it ends."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Literal

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.worker import Worker

from dspark_cli.backends.errors import ContextFull, DsparkError
from dspark_cli.engine.answer import Answer
from dspark_cli.engine.conversation import Conversation, Message
from dspark_cli.engine.kept import kept_file
from dspark_cli.engine.rounds import Request
from dspark_cli.engine.spans import Spans
from dspark_cli.engine.talk import Settings
from dspark_cli.engine.watch import Watch
from dspark_cli.tui import messages as m
from dspark_cli.tui.budget import Budget
from dspark_cli.tui.closing import on_signals, on_terminal_gone, record, surely_end
from dspark_cli.tui.commands import COMMANDS
from dspark_cli.tui.decoder import Decoder
from dspark_cli.tui.display import Look, Turn
from dspark_cli.tui.driver import forgiving_driver
from dspark_cli.tui.help import key_words
from dspark_cli.tui.history import History
from dspark_cli.tui.opening import Opened, Opener
from dspark_cli.tui.panel import Panel
from dspark_cli.tui.prompt import Prompt
from dspark_cli.tui.section import Section
from dspark_cli.tui.style import CSS, SHORT, TINY, WIDE
from dspark_cli.tui.summary import Summary
from dspark_cli.tui.transcript import Transcript
from dspark_cli.tui.watching import Watching

TWICE_S = 2.0  # two Ctrl-C within this leave
HUNG_UP = 129  # as the signal would have it


class Window(App[None]):
    """One conversation with one pair. `Working` adds the work behind it, `ChatApp` the commands.

    problem: what kept the pair from loading; raised by the command once the terminal is as it was
    kept:    the file the conversation was kept in; None while there is nothing to keep
    """

    CSS = CSS
    TITLE = "dspark"
    ENABLE_COMMAND_PALETTE = True
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012  (the base declares them so)
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (TINY, "-short"), (SHORT, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "interrupt", "Stop", show=False, priority=True),
        Binding("ctrl+l", "redraw", "Redraw", show=False, priority=True),
        *(Binding(key, f"command('{c.name}')", c.help, show=False, priority=True) for c in COMMANDS for key in c.keys),
    ]

    def __init__(
        self,
        opener: Opener,
        talk: Conversation,
        settings: Settings,
        history: History,
        executor: ThreadPoolExecutor | None = None,
    ) -> None:
        super().__init__(driver_class=forgiving_driver())
        self.opener, self.talk, self.settings = opener, talk, settings
        self._executor = executor or ThreadPoolExecutor(1, "engine")
        self.problem: Exception | None = None
        self.kept: Path | None = None
        self.budget = Budget()
        self.decoder = Decoder(self.budget)
        self.watching = Watching()
        self.busy = "loading"
        self.coloured = False
        self.request: Request | None = None
        self.answer: Answer | None = None
        #: what the user wants once the answer is there
        self.afterwards: list[Callable[[], object]] = []
        self._unwatch: Callable[[], None] = lambda: None
        self._opened: Opened | None = None
        self._spans: Spans | None = None
        self._watch = Watch(None)
        self._turn: Turn | None = None
        self._instead_of: list[Message] | None = None
        self._engine_worker: Worker[None] | None = None
        self._interrupted = -TWICE_S
        self._prompt = Prompt(history, id="prompt")
        self._transcript = Transcript(self._look, id="talk")
        self._head = Section(1, id="head")
        self._keys = Section(1, id="keys")
        self._summary, self._panel = Summary(self.watching), Panel(self.watching)

    def compose(self) -> ComposeResult:
        yield self._head
        with Horizontal(id="body"):
            with Vertical(id="side"):
                yield self._transcript
                yield self._summary
                yield self._prompt
            yield self._panel
        yield self._keys

    def on_mount(self) -> None:
        # Textual's thread workers run in the default executor: one thread for all that touches the engine. libgomp keeps a
        # pool for each thread that computes and probably stops spinning with more threads in its pools than cores: 36 instead
        # of 95 tok/s on two cores when the model was loaded in another thread (docs/chat.md).
        if sys.platform != "win32":  # where Textual sleeps in that executor too, and OpenMP is another one
            asyncio.get_running_loop().set_default_executor(self._executor)
        on_signals(self._ended, self.action_interrupt)
        self._unwatch = on_terminal_gone(self._terminal_gone)
        self._keys.show([keys_line()])
        self.rebuild()
        self._prompt.focus()

    def on_resize(self) -> None:
        """Draw everything: a window that was small for a moment has lost what stood there, whatever its size is now."""
        self.call_after_refresh(self.action_redraw)

    def action_redraw(self) -> None:
        self.refresh(layout=True)

    def _look(self, width: int) -> Look:
        theme = "monokai" if self.current_theme.dark else "friendly"
        return Look(width, theme, plain=self.no_color, tokens=self.coloured)

    # -- the screen --------------------------------------------------------------------------------------------------

    def show_figures(self) -> None:
        """Panel, summary and head as of now."""
        self.show_head()
        self._summary.update()
        self._panel.update()

    def show_head(self, doing: str = "") -> None:
        """The first line: what is loaded, how it samples, what goes on."""
        parts = [("dspark ", "bold")]
        if self._opened is not None:
            info = self._opened.session.target.info
            sampling = self.settings.sampling
            warmth = "greedy" if sampling.greedy else f"T {sampling.temperature:g}"
            parts.append((f"{info.name} {info.format} on {info.device}, {warmth}", ""))
            parts.append((f"  drafter {self.watching.drafter or 'none'}, policy {self.watching.policy}", "dim"))
        parts.append((f"  {doing or self.busy}", "yellow"))
        self._head.show([Text.assemble(*parts)])

    def rebuild(self) -> None:
        """The turns on the screen follow the conversation; those that are there already stay as they are."""
        turns = self._transcript.content.turns
        old = {(turn.role, turn.text): turn for turn in turns if turn.runs}
        notes = [turn for turn in turns if turn.role == "note"]
        head = [Turn("note", f"system: {self.talk.system}")] if self.talk.system else []
        said = [old.get((msg["role"], msg["content"]), Turn(msg["role"], msg["content"])) for msg in self.talk.messages]
        turns[:] = [*(note for note in notes if not note.text.startswith("system: ")), *head, *said]
        self._transcript.changed(follow=True)

    def say(self, text: str) -> None:
        """A line of the program in the conversation's window."""
        turns = self._transcript.content.turns
        notes = next((i for i, turn in enumerate(turns) if turn.role != "note"), len(turns))
        turns.insert(notes, Turn("note", text))
        self._transcript.changed()

    # -- to the user ---------------------------------------------------------------------------------------------------

    def tell(
        self, text: str, *, severity: Literal["information", "warning", "error"] = "information", title: str = ""
    ) -> None:
        self.notify(text, title=title, severity=severity, markup=False)

    def fail(self, title: str, error: Exception) -> None:
        """An expected failure in its own words; another one is written to a file, and the window lives on."""
        if not isinstance(error, DsparkError):
            self.tell(record(error), severity="error", title=title)
            return
        hint = error.hint
        if isinstance(error, ContextFull):
            hint = "/new begins anew, /save keeps this one; a larger --ctx holds more"
        self.tell(f"{error}\ntry: {hint}" if hint else str(error), severity="error", title=title)

    def on_input_dropped(self, _: m.InputDropped) -> None:
        self.tell("what was typed or pasted is not UTF-8 text and was dropped", severity="warning")

    # -- the end -----------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Write the conversation, with what there is of an answer, where `--resume` finds it."""
        talk = Conversation(self.talk.system, list(self.talk.messages))
        if self.busy == "answering" and self.answer is not None and self.answer.text:
            talk.answered(self.answer.text)
        if not talk.messages:
            return
        file = kept_file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            talk.save(file)
            self.kept = file
        except (OSError, DsparkError) as error:
            self.fail("the conversation cannot be kept", error)

    def action_interrupt(self) -> None:
        """Ctrl-C: copy what is selected, else stop; twice: leave."""
        now = time.monotonic()
        twice, self._interrupted = now - self._interrupted < TWICE_S, now
        if twice:
            self.leave(130)
        elif self._prompt.selected_text:
            self.copy_to_clipboard(self._prompt.selected_text)
        else:
            if self.busy:
                self.stop()
            self.tell("Ctrl-C again leaves")

    def leave(self, code: int = 0) -> None:
        """Stop what runs, keep the conversation, close the window. code: what the process ends with."""
        self.keep()
        self.stop()
        self.exit(return_code=code)

    def _ended(self, code: int) -> None:
        """A signal: there may be no terminal left to write to."""
        surely_end(code)
        self.leave(code)

    def _terminal_gone(self) -> None:
        """In a thread of its own, as the window may hang in a write."""
        self.keep()
        surely_end(HUNG_UP)
        self.call_from_thread(self.leave, HUNG_UP)

    def free(self) -> None:
        """Free the pair; called when the window is closed."""
        self._unwatch()
        if self._opened is not None and self.decoder.wait(seconds=20):
            self._opened.session.close()
            self._opened = None

    def stop(self) -> None:
        """Ask the worker to end; it answers with AnswerDone, RaceDone or LoadFailed."""
        self.workers.cancel_group(self, "engine")


def keys_line() -> Text:
    """The last line: keys worth knowing."""
    text = Text()
    for command in COMMANDS:
        if command.footer:
            text.append(f"{key_words(command).replace('Ctrl-', '^')} ", "bold").append(f"{command.footer} ", "dim")
    return text.append("^P ", "bold").append("all", "dim")
