"""The one place where an expected failure becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from dspark_cli.backends.errors import DsparkError

INTERRUPTED = 130


class DsparkGroup(TyperGroup):
    """Turns `DsparkError`, Ctrl-C and a closed pipe into an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DsparkError as error:
            report(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # `| head` closed the pipe: there is nobody to write to, not even at shutdown.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


def report(error: DsparkError) -> None:
    """`error: ...` and, when there is something to suggest, `  try: ...` on stderr."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(str(error), err=True)
    if error.hint:
        typer.echo(f"  try: {error.hint}", err=True)
