"""`dspark chat`: a conversation, line by line. The cache is kept, so a turn computes only what is new."""

from __future__ import annotations

import contextlib
import json as json_
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_cli.backends.errors import ContextFull, DsparkError
from dspark_cli.cli import options as o
from dspark_cli.cli.errors import INTERRUPTED, report

if TYPE_CHECKING:
    from dspark_cli.cli.answer import Answer
    from dspark_cli.engine.rounds import SamplingOptions
    from dspark_cli.engine.session import Session
    from dspark_cli.engine.watch import Watch

HELP = """\
/help          this list
/reset         forget the conversation (the system prompt stays)
/stats         statistics of the last answer
/system TEXT   set the system prompt and start over; without TEXT: show it
/save FILE     write the conversation (.json, anything else is Markdown)
/quit          leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""


def chat(
    model: Annotated[str, typer.Argument(help="Name from `dspark models`, or path to a GGUF file.")] = "smollm2-135m",
    plain: Annotated[bool, typer.Option("--plain", help="Line by line, without a full-screen interface.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="One line of statistics after each answer.")] = True,
    drafter: o.Drafter = "auto",
    policy: o.Policy = None,
    max_tokens: o.MaxTokens = 1024,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repeat_penalty: o.RepeatPenalty = 1.0,
    seed: o.Seed = 0,
    accept: o.Accept = "exact",
    thinking: o.Thinking = None,
    backend: o.Backend = "auto",
    quant: o.Quant = None,
    ctx: o.Ctx = None,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = None,
    kv_type: o.KvType = "f16",
    flash_attn: o.FlashAttn = "auto",
    offline: o.Offline = False,
) -> None:
    """Talk to a model. Answers go to stdout, everything else to stderr.

    Example: dspark chat smollm2-135m --system "Answer in one sentence."
    """
    sampling = o.sampling_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        accept=accept,
    )
    pair = o.PairOptions(
        *(model, drafter, policy, backend, quant, ctx, threads, gpu_layers, kv_type, flash_attn, offline),
        thinking=thinking,
    )
    from dspark_cli.engine.watch import Watch

    with o.open_session(pair) as session:
        talk = Conversation(session, sampling, max_tokens, thinking, system, show_stats=stats)
        talk.watch = Watch(session.drafter.kind if session.drafter else None)
        with line_history():
            Repl(talk, interactive=sys.stdin.isatty()).run()


@dataclass
class Conversation:
    """Messages so far, and how to answer the next one."""

    session: Session
    sampling: SamplingOptions
    max_tokens: int
    thinking: bool | None
    system: str | None
    show_stats: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Answer | None = None
    watch: Watch | None = None

    def all_messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages]

    def ask(self, text: str) -> None:
        """Answer `text`. An interrupted answer stays in the conversation as far as it came; a refused question does not.

        Raises KeyboardInterrupt after the partial answer was kept, DsparkError with the conversation as it was before.
        """
        from dspark_cli.cli.answer import Answer, stream

        self.messages.append({"role": "user", "content": text})
        answer = Answer()
        try:
            request = self.session.chat_request(
                self.all_messages(), max_tokens=self.max_tokens, sampling=self.sampling, thinking=self.thinking
            )
            stream(self.session.run(request), answer, watch=self.watch)
        finally:
            if answer.tokens:
                self.last = answer
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()

    def save(self, file: Path) -> None:
        """Write the conversation. Raises DsparkError when the file cannot be written."""
        if file.suffix == ".json":
            text = json_.dumps(self.all_messages(), ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n\n".join(f"**{m['role']}**\n\n{m['content']}" for m in self.all_messages()) + "\n"
        try:
            file.expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise DsparkError(f"{file} cannot be written: {error.strerror}") from None


class Repl:
    """Reads lines, runs commands, asks. Prompts and notices go to stderr, so that stdout is only answers."""

    def __init__(self, talk: Conversation, *, interactive: bool) -> None:
        self.talk, self.interactive = talk, interactive
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(HELP),
            "/reset": self._reset,
            "/stats": self._stats,
            "/system": self._system,
            "/save": self._save,
        }

    def run(self) -> None:
        """Until /quit or the end of input. Ctrl-C at the prompt leaves with exit code 130."""
        if self.interactive:
            info = self.talk.session.target.info
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
                self.talk.ask(line)
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
        if self.talk.show_stats and self.talk.last is not None:
            s = self.talk.last.stats
            note(f"[{s.tokens} tokens, {s.decode_tok_s:.1f} tok/s, {s.accepted_length:.2f} per round]")

    def _reset(self, _: str) -> None:
        self.talk.messages.clear()
        note("new conversation")

    def _stats(self, _: str) -> None:
        from dspark_cli.cli.answer import print_stats

        if self.talk.last is None:
            note("no answer yet")
        else:
            print_stats(self.talk.session, self.talk.last)

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


def note(text: str) -> None:
    """Something that is not an answer."""
    typer.secho(text, dim=True, err=True)


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Arrow keys and a history that outlives the program, where readline exists."""
    try:
        import readline
    except ImportError:
        yield
        return
    from platformdirs import user_state_path

    file = user_state_path("dspark") / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
