"""`dspark train`: a drafter for a target of your own, from text that the target writes itself."""

from __future__ import annotations

import json as json_
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from dspark_cli.backends.errors import BadInput, NotReady
from dspark_cli.backends.llamacpp.quants import Formats
from dspark_cli.cli import options as o
from dspark_cli.cli.errors import INTERRUPTED
from dspark_cli.cli.lines import NowAndThen

if TYPE_CHECKING:
    from dspark_cli.training.pipeline import Recipe

KINDS = ("dspark", "dflash", "eagle3")
HEADS = ("vanilla", "gated", "rnn")
THROUGH = ("auto", "llamacpp", "torch")


def train(
    model: o.Model,
    drafter: Annotated[str, typer.Option(help="dspark, dflash or eagle3.")] = "dspark",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the drafter (eagle3 has one).")] = 1,
    block: Annotated[int, typer.Option(min=1, max=16, help="Tokens drafted per round.")] = 5,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the sequential head; 0 leaves it out.")] = 128,
    head: Annotated[
        str, typer.Option(help="Sequential head: vanilla, gated or rnn (the latter two run in torch only).")
    ] = "vanilla",
    vocab: Annotated[
        int, typer.Option(min=0, help="Tokens the drafter can propose, the most frequent ones; 0 is all.")
    ] = 8192,
    hours: Annotated[
        float, typer.Option(min=0.001, help="Hours of training proper (of a CPU: of all its threads).")
    ] = 1.0,
    anchors: Annotated[
        int,
        typer.Option(min=0, help="Positions to train on, instead of --hours: the same on a quick and a busy machine."),
    ] = 0,
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of text that the target writes for it.")] = 500_000,
    max_hours: Annotated[
        float | None, typer.Option(help="Stop after so many hours of this run; the next one goes on.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt per line; default: the target makes its own.")
    ] = None,
    documents: Annotated[
        list[Path] | None, typer.Option(help="Use these dialogues (.jsonl of token ids) as well.")
    ] = None,
    through: Annotated[
        str, typer.Option(help="Who runs the target for texts and features: auto, llamacpp or torch.")
    ] = "auto",
    from_: Annotated[Path | None, typer.Option("--from", help="Begin with the weights of this drafter.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="NAME.gguf, or a folder for safetensors.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for texts, features and checkpoints.")] = None,
    format: Annotated[str, typer.Option("--format", help="Of the drafter's matrices in the GGUF file.")] = "Q8_0",
    vocab_format: o.VocabFormat = "",
    embedding_format: o.EmbeddingFormat = "",
    quant: o.Quant = None,
    threads: o.Threads = None,
    seed: o.Seed = 0,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Train a drafter for MODEL. Stopped at any moment, the same command goes on where it was.

    Example: dspark train smollm2-135m --hours 2 --tokens 1000000
    """
    formats = Formats(format, vocab_format, embedding_format)
    _check(drafter, head, through, out, prompts)
    _needs_torch()
    name, target = _target(model, quant, offline)
    work = work or _work_folder(name, drafter)
    out = out or work / f"{name}-{drafter}{'.gguf' if drafter != 'eagle3' and head == 'vanilla' else ''}"

    from dspark_cli.training.pipeline import Clock, OutOfTime, Pipeline, Recipe, import_documents, kept
    from dspark_cli.training.process import prepare_process

    prepare_process(threads)
    recipe = Recipe(
        name, drafter, layers, block, rank, vocab, head, hours, tokens, through, (), str(prompts or ""), seed, anchors
    )
    with _Bars(recipe) as bars:
        try:
            with kept(work):
                pipeline = Pipeline(target, work, recipe, bars, clock=Clock(max_hours))
                if documents and not pipeline.documents.exists():
                    import_documents(documents, pipeline.documents, pipeline.n_vocab)
                made = pipeline.run(out, formats=formats, command=_command(), start=from_)
        except (OutOfTime, KeyboardInterrupt) as stopped:
            why = f"after --max-hours {max_hours:g}" if isinstance(stopped, OutOfTime) else "by Ctrl-C"
            bars.say(f"stopped {why}; {work} is kept: the same command goes on")
            raise typer.Exit(0 if isinstance(stopped, OutOfTime) else INTERRUPTED) from None
    evaluation = json_.loads((work / "evaluation.json").read_text())
    if json:
        typer.echo(json_.dumps({"drafter": str(made.drafter), "work": str(work), **evaluation}))
        return
    _print(evaluation)
    typer.echo(f"wrote {made.drafter}\n  try: dspark chat {model} --drafter {made.drafter}", err=True)


def _check(drafter: str, head: str, through: str, out: Path | None, prompts: Path | None) -> None:
    for what, value, known in (("drafter", drafter, KINDS), ("head", head, HEADS), ("--through", through, THROUGH)):
        if value not in known:
            raise BadInput(f"unknown {what} {value!r}: one of {', '.join(known)}")
    if out is not None and out.suffix == ".gguf" and (drafter == "eagle3" or head != "vanilla"):
        what = "an Eagle3 drafter" if drafter == "eagle3" else f"a {head} head"
        raise BadInput(f"{what} has no form as a GGUF file", hint=f"--out {out.with_suffix('')}")
    if prompts is not None and not prompts.is_file():
        raise BadInput(f"{prompts} is no file")


def _needs_torch() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "safetensors") if find_spec(name) is None]
    if missing:
        raise NotReady(
            f"training needs {' and '.join(missing)}, not installed here", hint="pip install 'dspark[torch]'"
        )


def _target(model: str, quant: str | None, offline: bool) -> tuple[str, Path]:
    found, _ = o.find_pair(o.PairOptions(model, "none", None, "auto", quant, None, None, None, "f16", "auto", offline))
    if found.path.is_dir():
        raise NotReady(
            f"{found.name} is a full-precision checkpoint; training reads GGUF targets in this version",
            hint=f"dspark train {model} --quant Q8_0",
        )
    return found.name, found.path


def _work_folder(name: str, drafter: str) -> Path:
    from platformdirs import user_data_path

    return user_data_path("dspark") / "training" / f"{name}-{drafter}"


def _command() -> str:
    return shlex.join(["dspark", *sys.argv[1:]])


def _print(evaluation: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("prompts", "temperature", "tau", "accepted by position", box=None, pad_edge=False)
    for row in evaluation["rows"]:
        survival = " ".join(f"{s:.0%}" for s in row["survival"])
        table.add_row(row["prompts"], f"{row['temperature']:g}", f"{row['accepted_length']:.2f}", survival)
    Console().print(table)


class _Bars:
    """A bar a stage on a terminal, a line now and then elsewhere. On stderr."""

    def __init__(self, recipe: Recipe) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._recipe, self._terminal = recipe, sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            speed_estimate_period=300,
        )
        self._stage, self._have, self._total, self._began, self._lines = "", 0.0, 0.0, 0.0, NowAndThen()
        self._first = 0.0
        self._task: Any = None

    def begin(self, stage: str, total: float, have: float, note: str) -> None:
        self._stage, self._total, self._have, self._first = stage, total, have, have
        self._began, self._lines = time.monotonic(), NowAndThen()
        if self._terminal:
            self._task = self._progress.add_task(stage, total=total, completed=int(have), note=note)
        else:
            typer.echo(f"{stage}: {have / total:.0%} done; {note}", err=True)

    def advance(self, amount: float, note: str = "") -> None:
        self._have += amount
        if self._terminal:
            self._progress.advance(self._task, amount)
            if note:
                self._progress.update(self._task, note=note)
        elif self._lines.due():
            took = time.monotonic() - self._began
            left = (self._total - self._have) * took / max(1e-9, self._have - self._first)
            typer.echo(f"{self._stage}: {self._have / self._total:.0%}, {left / 60:.0f} min left; {note}", err=True)

    def end(self) -> None:
        if self._terminal:
            self._progress.update(self._task, completed=self._total)

    def say(self, text: str) -> None:
        self._progress.stop()
        typer.echo(text, err=True)

    def __enter__(self) -> Self:
        if self._terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._progress.stop()
