"""The `dspark` command. Each command has its own file; heavy imports wait until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dspark_cli import __version__
from dspark_cli.cli import batch, bench, calibrate, chat, convert, doctor, generate, models, pull, rm, train
from dspark_cli.cli.errors import DsparkGroup

app = typer.Typer(
    cls=DsparkGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Local language models, the same answer sooner: speculative decoding that shows what it does.",
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("batch")(batch.batch)
app.command("models")(models.models)
app.command("pull")(pull.pull)
app.command("rm")(rm.rm)
app.command("bench")(bench.bench)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
app.command("train")(train.train)
app.command("convert")(convert.convert)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dspark {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `dspark` script."""
    app(prog_name="dspark")
