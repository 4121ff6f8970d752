"""`dspark models`: what the registry knows, what fits this machine, and what is here."""

from __future__ import annotations

import json as json_
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cli.cli import options as o

if TYPE_CHECKING:
    from dspark_cli.registry.choose import Machine
    from dspark_cli.registry.schema import Entry


#: columns of a terminal from which the published formats have room in the table
WIDE = 130


def models(
    name: Annotated[str | None, typer.Argument(help="Everything about this one.", show_default=False)] = None,
    fits: Annotated[bool, typer.Option("--fits", help="Only what fits this machine.")] = False,
    json: o.Json = False,
) -> None:
    """List the models by name: size, the best format that fits this machine with its drafter, what is on this disk.

    Example: dspark models qwen3-8b
    """
    from dspark_cli.registry import find, load_models
    from dspark_cli.registry.devices import this_machine
    from dspark_cli.registry.resolve import is_repository, pulled_entry

    machine = this_machine()
    entries = list(load_models().values())
    if name is not None:
        entries = [pulled_entry(name) if is_repository(name) else find(name)]
    rows = [row for row in (_row(entry, machine) for entry in entries) if row["fits"] or not fits]
    if json:
        typer.echo(json_.dumps(rows[0] if name is not None and rows else rows, ensure_ascii=False, default=str))
    elif name is not None:
        for row in rows:
            _print_one(row, machine)
    else:
        _print_table(rows, machine)


def _row(entry: Entry, machine: Machine) -> dict[str, Any]:
    from dspark_cli.backends.errors import DsparkError
    from dspark_cli.registry.choose import UNKNOWN, Wish, choose, fitting, quants
    from dspark_cli.registry.quants import FULL_PRECISION

    here = entry.on_disk()
    checkpoint = entry.checkpoint()
    wish = Wish(here=(*here, *((FULL_PRECISION,) if checkpoint else ())))
    problem, best = None, None
    try:
        best = choose(entry, machine, wish)
    except DsparkError as error:
        problem = str(error)
    plans = fitting(entry, machine)
    sizes = {quant: entry.file_bytes(quant) for quant in quants(entry)}
    if entry.safetensors:
        sizes[FULL_PRECISION] = entry.file_bytes(FULL_PRECISION)
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "family": entry.family,
        "parameters": None if entry.family == UNKNOWN else entry.parameters,
        "context": entry.context,
        "licence": entry.licence,
        "thinking": entry.thinking,
        "gated": entry.gated,
        "gguf": entry.gguf,
        "safetensors": entry.safetensors,
        "format_bytes": sizes,
        "fits": {quant: {"device": plan.device.name, "bytes": plan.total} for quant, plan in plans.items()},
        "best": None if best is None else {"quant": best.quant, "backend": best.backend, "plan": best.plan.as_dict()},
        "drafter": None if best is None or best.drafter is None else best.drafter.repository or best.drafter.builtin,
        "problem": problem,
        "on_disk": {quant: _bytes_on_disk(path) for quant, path in here.items()}
        | ({FULL_PRECISION: _bytes_on_disk(checkpoint)} if checkpoint else {}),
        "drafters": [{**d.model_dump(), "path": d.path} for d in entry.drafter],
        "unconfirmed": list(entry.unconfirmed),
        "source": entry.source,
        "note": entry.note,
    }


def _bytes_on_disk(path: Any) -> int:
    from dspark_cli.registry.quants import parts_of

    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return sum((path.parent / part).stat().st_size for part in parts_of(path.name))


def _cells(row: dict[str, Any], machine: Machine) -> list[str]:
    """One line of the table."""
    from dspark_cli.registry.plan import size

    best, fits = row["best"], "-"
    if best:
        fits = f"{best['quant']} {size(best['plan']['total_bytes'])}"
        fits += f", {best['plan']['device']}" if machine.accelerators else ""
    kinds = dict.fromkeys(d["kind"] for d in row["drafters"] if d["usable"])
    taus = [max(d["accepted_length"].values()) for d in row["drafters"] if d["accepted_length"]]
    tau = f"{max(taus):.1f}" if taus else ""
    here = ", ".join(row["on_disk"]) or "-"
    return [row["name"], row["parameters"], _formats(row), fits, here, ", ".join(kinds) or "lookup", tau]


def _formats(row: dict[str, Any]) -> str:
    """Its smallest and its largest published file: "Q4_K_M 2.4 GB to BF16 8.0 GB"."""
    from dspark_cli.registry.plan import size

    by_size = sorted(row["format_bytes"].items(), key=lambda item: item[1])
    ends = dict([*by_size[:1], *by_size[-1:]])
    return " to ".join(f"{quant} {size(n_bytes)}" for quant, n_bytes in ends.items())


def _print_table(rows: list[dict[str, Any]], machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table

    from dspark_cli.registry.plan import size

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no edge to wrap at
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = ["name", "size", "formats", "fits here as", "on disk", "drafters", "tau"]
    if console.width < WIDE:
        headings.remove("formats")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in ("name", "formats", "fits here as"))
    for row in rows:
        cells = _cells(row, machine)
        table.add_row(*(cells if console.width >= WIDE else [*cells[:2], *cells[3:]]))
    console.print(table)
    devices = ", ".join(f"{d.name} {size(d.usable)}" for d in (*machine.accelerators, machine.cpu))
    console.print(
        f"Fits: with its drafter and context, of what can be used now: {devices}. tau: tokens a round as published. "
        "`dspark models NAME` says everything about one.",
        style="dim",
        highlight=False,
    )
    for row in rows:
        if row["note"]:
            console.print(f"{row['name']}: {row['note']}", style="dim", highlight=False)


def _print_one(row: dict[str, Any], machine: Machine) -> None:
    from dspark_cli.registry.plan import size
    from dspark_cli.registry.quants import FULL_PRECISION

    echo = typer.echo
    about = f"{row['parameters']}, {row['family']}; {', '.join(row['aliases']) or 'no aliases'}"
    echo(f"{row['name']} ({about if row['parameters'] else 'not in models.toml'})")
    for key in ("licence", "context", "thinking", "gguf", "safetensors", "source", "note"):
        if row[key]:
            mark = " (not confirmed)" if key in row["unconfirmed"] else ""
            echo(f"{key:<12}{row[key]}{mark}")
    if row["gated"]:
        echo("gated       its owner wants terms accepted first: `dspark pull` says how")
    full = "does not fit"
    if not any("torch" in device.runs for device in machine.accelerators):
        full = "needs a GPU that torch drives (on the CPU: --backend torch)"
    for quant, n_bytes in row["format_bytes"].items():
        fit = row["fits"].get(quant)
        unfit = full if quant == FULL_PRECISION else "does not fit"
        where = f"fits {fit['device']}, {size(fit['bytes'])} with drafter and context" if fit else unfit
        here = ", on disk" if quant in row["on_disk"] else ""
        echo(f"format      {quant:<7} {size(n_bytes):>8}  {where}{here}")
    for d in row["drafters"]:
        taus = ", ".join(f"{key} {value}" for key, value in d["accepted_length"].items())
        facts = [
            f"block {d['block_size']}" if d["block_size"] else "",
            f"tau {taus}" if taus else "",
            d["speedup"] or "",
            "gated" if d["gated"] else "",
            "on disk" if d["path"] else "",
            "" if d["usable"] else f"cannot be used: {d['note']}",
            f"not confirmed: {', '.join(d['unconfirmed'])}" if d["unconfirmed"] else "",
        ]
        where = d["repository"] or d["builtin"]
        said = "; ".join(filter(None, (*facts, d["source"])))
        echo(f"drafter     {d['kind']:<7} {where} ({d['format']}){f': {said}' if said else ''}")
    if row["problem"]:
        echo(f"problem     {row['problem']}")
