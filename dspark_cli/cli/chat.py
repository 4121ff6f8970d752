"""`dspark chat`: a conversation. Full screen on a terminal, line by line elsewhere and with `--plain`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dspark_cli.backends.errors import BadInput
from dspark_cli.cli import options as o


def chat(
    model: Annotated[str, typer.Argument(help=o.MODEL)] = "smollm2-135m",
    plain: Annotated[bool, typer.Option("--plain", help="Line by line, without a full-screen interface.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a saved conversation (.json or .md).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last conversation of this program.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats/--no-stats", help="With --plain: one line of statistics after each answer.")
    ] = True,
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
    """Talk to a model, and watch what drafting does. With --plain answers go to stdout, everything else to stderr.

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
    from dspark_cli.engine.conversation import Conversation
    from dspark_cli.engine.kept import last_conversation
    from dspark_cli.engine.talk import Settings

    if load is not None and resume:
        raise BadInput("--load names a conversation, and --resume asks for the last one")
    file = last_conversation() if resume else load
    talk = Conversation.load(file) if file is not None else Conversation()
    talk.system = system if system is not None else talk.system
    settings = Settings(sampling, max_tokens, thinking)
    if plain or not full_screen():
        from dspark_cli.cli.repl import run_plain

        run_plain(pair, talk, settings, show_stats=stats)
    else:
        run_full_screen(pair, talk, settings)


def full_screen() -> bool:
    """Whether there is a terminal that can be drawn on (Textual draws on stderr; stdout is where answers would go)."""
    terminals = all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    return terminals and os.environ.get("TERM", "") not in ("", "dumb")


def _leave_closed_terminal() -> None:
    """What a closed terminal did not take stays in the buffers, and Python's last flush would change the exit code to 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_full_screen(pair: o.PairOptions, talk: object, settings: object) -> None:
    """Open the terminal UI. What ends it as an error is raised once the terminal is as it was."""
    from dspark_cli.cli.opener import PairOpener
    from dspark_cli.engine.conversation import Conversation
    from dspark_cli.engine.talk import Settings
    from dspark_cli.tui.app import make_app

    assert isinstance(talk, Conversation)
    assert isinstance(settings, Settings)
    opener = PairOpener(pair)
    opener.check()
    app = make_app(opener, talk, settings)
    app.run()
    app.free()
    if app.kept is not None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            o.note(f"conversation kept: dspark chat --resume goes on with it ({app.kept})")
    _leave_closed_terminal()
    if app.problem is not None:
        raise app.problem
    if app.return_code:
        raise typer.Exit(app.return_code)
