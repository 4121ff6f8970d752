"""`dspark models`: what the registry knows, and what of it is here."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from dspark_cli.cli import options as o

if TYPE_CHECKING:
    from dspark_cli.registry import Entry


def models(json: o.Json = False) -> None:
    """List the models by name, with their drafters and what is on this disk.

    Example: dspark models --json
    """
    from dspark_cli.registry import load_models

    rows = [_row(entry) for entry in load_models().values()]
    if json:
        typer.echo(json_.dumps(rows, ensure_ascii=False, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "size", "on disk", "drafters", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        here = ", ".join(f"{form} ({size / 1e6:.0f} MB)" for form, size in row["on_disk"].items())
        drafters = ", ".join(dict.fromkeys(d["kind"] for d in row["drafters"])) or "lookup"
        table.add_row(row["name"], row["parameters"], here or "-", drafters)
    console = Console()
    console.print(table)
    notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    for text in notes:
        console.print(text, style="dim", highlight=False)


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "family": entry.family,
        "parameters": entry.parameters,
        "gguf": entry.gguf,
        "safetensors": entry.safetensors,
        "on_disk": {form: path.stat().st_size for form, path in entry.on_disk().items()},
        "drafters": [{**asdict(d), "path": d.path} for d in entry.drafter],
        "note": entry.note,
    }
