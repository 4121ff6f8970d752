"""`dspark rm`: delete a pulled pair."""

from __future__ import annotations

import json as json_
import sys
from typing import Annotated

import typer

from dspark_cli.backends.errors import BadInput
from dspark_cli.cli import options as o


def rm(
    model: Annotated[str | None, typer.Argument(help="Name or Hub repository; without it, list what could go.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, delete nothing.")] = False,
    json: o.Json = False,
) -> None:
    """Show what a pulled model takes on disk, and delete it after a question.

    Example: dspark rm qwen3-4b --yes
    """
    from dspark_cli.registry.plan import size
    from dspark_cli.registry.remove import carry_out, pulled, removal

    found = removal(model) if model is not None else pulled()
    total = sum(item.freed for item in found)
    if not json:
        for item in found:
            files = f"{len(item.links)} file{'' if len(item.links) == 1 else 's'}"
            shared = f" (also the files of {', '.join(item.shared)})" if item.shared else ""
            typer.echo(f"{item.repository}: {files}, {size(item.freed)}{shared}")
        typer.echo(f"{'total' if found else 'nothing was pulled yet:'} {size(total)}")
    delete = model is not None and not dry_run
    if delete and not yes:
        if json or not sys.stdin.isatty():
            raise BadInput(f"deleting {size(total)} needs a yes", hint=f"dspark rm {model} --yes")
        delete = typer.confirm("Delete?", err=True)
    freed = carry_out(found) if delete else 0
    if json:
        rows = [{"repository": i.repository, "files": len(i.links), "bytes": i.freed} for i in found]
        typer.echo(json_.dumps({"repositories": rows, "bytes": total, "freed_bytes": freed}))
    elif freed:
        typer.echo(f"freed {size(freed)}")
