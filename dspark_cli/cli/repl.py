"""`dspark chat --plain`: a conversation line by line. The cache is kept, so a turn computes only what is new."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dspark_cli.backends.errors import ContextFull, DsparkError
from dspark_cli.cli import options as o
from dspark_cli.cli.errors import INTERRUPTED, report
from dspark_cli.cli.options import note
from dspark_cli.engine.conversation import Conversation

if TYPE_CHECKING:
    from dspark_cli.engine.answer import Answer
    from dspark_cli.engine.session import Session
    from dspark_cli.engine.talk import Settings
    from dspark_cli.engine.watch import Watch

HELP = """\
/help          this list
/reset         forget the conversation (the system prompt stays)
/retry         answer the last question again
/edit TEXT     ask TEXT in place of the last question
/stats         statistics of the last answer
/system TEXT   set the system prompt and start over; without TEXT: show it
/save FILE     write the conversation (.json, anything else is Markdown)
/load FILE     go on with a saved conversation
/quit          leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""


def run_plain(pair: o.PairOptions, talk: Conversation, settings: Settings, *, show_stats: bool) -> None:
    """Load the pair and talk until /quit or the end of input."""
    from dspark_cli.engine.watch import Watch

    with o.open_session(pair) as session:
        watch = Watch(session.drafter.kind if session.drafter else None)
        speaker = Speaker(session, talk, settings, watch)
        with line_history():
            Repl(speaker, interactive=sys.stdin.isatty(), show_stats=show_stats).run()


@dataclass
class Speaker:
    """Answers the questions of a conversation on stdout."""

    session: Session
    talk: Conversation
    settings: Settings
    watch: Watch
    last: Answer | None = None

    def ask(self, text: str) -> None:
        """Answer `text`. A refused question does not stay in the conversation (see `answer`)."""
        self.talk.ask(text)
        self.answer()

    def answer(self) -> None:
        """Answer the last question. An interrupted answer stays as far as it came.

        Raises KeyboardInterrupt after the partial answer was kept, DsparkError with the question taken back.
        """
        from dspark_cli.cli.answer import stream
        from dspark_cli.engine.answer import Answer

        answer = Answer()
        try:
            request = self.settings.request(self.session, self.talk)
            stream(self.session.run(request), answer, watch=self.watch)
        finally:
            if answer.tokens:
                self.last = answer
                self.talk.answered(answer.text)
            else:
                self.talk.take_back()


class Repl:
    """Reads lines, runs commands, asks. Prompts and notices go to stderr, so that stdout is only answers."""

    def __init__(self, speaker: Speaker, *, interactive: bool, show_stats: bool = True) -> None:
        self.speaker, self.talk = speaker, speaker.talk
        self.interactive, self.show_stats = interactive, show_stats
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(HELP),
            "/reset": self._reset,
            "/retry": self._retry,
            "/edit": self._edit,
            "/stats": self._stats,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> None:
        """Until /quit or the end of input. Ctrl-C at the prompt leaves with exit code 130."""
        if self.interactive:
            info = self.speaker.session.target.info
            note(f"{info.name} {info.format}. /help lists the commands, Ctrl-D leaves.")
        while (line := self._read()) is not None:
            if line.strip() in ("/quit", "/exit"):
                return
            if line.strip():
                self._do(line)

    def _read(self) -> str | None:
        """The next message, continued lines joined; None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                line = self._line("> " if not lines else ". ")
            except EOFError:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str:
        if self.interactive:
            return input(prompt)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode("utf-8", errors="replace").rstrip("\r\n")

    def _do(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        try:
            if name in self._commands:
                self._commands[name](rest.strip())
            elif name.startswith("/") and name[1:].isalpha():
                note(f"unknown command {name}; /help lists them")
            else:
                self.speaker.ask(line)
                self._line_of_stats()
        except ContextFull as error:
            report(error)
            note("/reset starts a new conversation; /save FILE keeps this one")
        except DsparkError as error:
            report(error)
        except KeyboardInterrupt:
            if not self.interactive:
                raise typer.Exit(INTERRUPTED) from None
            note("(stopped; what was written stays in the conversation)")

    def _line_of_stats(self) -> None:
        if self.show_stats and self.speaker.last is not None:
            s = self.speaker.last.stats
            note(f"[{s.tokens} tokens, {s.decode_tok_s:.1f} tok/s, {s.accepted_length:.2f} per round]")

    def _reset(self, _: str) -> None:
        self.talk.reset()
        note("new conversation")

    def _retry(self, _: str) -> None:
        if not self.talk.drop_answer():
            note("nothing was asked yet")
            return
        self.speaker.answer()
        self._line_of_stats()

    def _edit(self, text: str) -> None:
        if not text:
            note("/edit needs the new text of the last question")
            return
        if self.talk.take_back() is None:
            note("nothing was asked yet")
            return
        self.speaker.ask(text)
        self._line_of_stats()

    def _stats(self, _: str) -> None:
        from dspark_cli.cli.answer import print_stats

        if self.speaker.last is None:
            note("no answer yet")
        else:
            print_stats(self.speaker.session, self.speaker.last)

    def _system(self, text: str) -> None:
        if not text:
            note(self.talk.system or "no system prompt")
            return
        self.talk.system = text
        self._reset("")

    def _save(self, name: str) -> None:
        if not name:
            note("/save needs a file name")
            return
        self.talk.save(Path(name))
        note(f"saved {len(self.talk.messages)} messages to {name}")

    def _load(self, name: str) -> None:
        if not name:
            note("/load needs a file name")
            return
        found = Conversation.load(Path(name))
        self.talk.system, self.talk.messages = found.system, found.messages
        note(f"loaded {len(self.talk.messages)} messages from {name}")


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Arrow keys and a history that outlives the program, where readline exists."""
    try:
        import readline
    except ImportError:
        yield
        return
    from dspark_cli.engine.kept import state_folder

    file = state_folder() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
