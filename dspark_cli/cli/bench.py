"""`dspark bench --local`: every way to decode on this machine, against plain decoding in the same process."""

from __future__ import annotations

import json as json_
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.cli import options as o
from dspark_cli.cli.errors import INTERRUPTED

if TYPE_CHECKING:
    from dspark_cli.bench.local import Results, Settings
    from dspark_cli.engine.session import OpenOptions


def bench(
    model: Annotated[str, typer.Argument(help=o.MODEL)] = "smollm2-135m",
    local: Annotated[
        bool, typer.Option("--local", help="Measure in this process (the only way there is so far).")
    ] = False,
    formats: Annotated[
        str | None, typer.Option(help="Requantize the target to these and compare, such as F16,Q8_0,Q4_1.")
    ] = None,
    kinds: Annotated[str | None, typer.Option(help="Kinds of prompts, separated by commas; default all six.")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Only these beside plain, such as auto,fixed:1,fixed:2; default all.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="Temperatures, separated by commas.")] = "0,1",
    prompts: Annotated[int, typer.Option(min=1, max=4, help="Prompts per kind.")] = 2,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens per answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Times every prompt is run by every arm.")] = 2,
    json: o.Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV on stdout.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report with plots to this file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    drafter: o.Drafter = "auto",
    backend: o.Backend = "auto",
    quant: o.Quant = None,
    seed: o.Seed = 0,
    ctx: o.Ctx = None,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = None,
    kv_type: o.KvType = "f16",
    flash_attn: o.FlashAttn = "auto",
    offline: o.Offline = False,
) -> None:
    """Measure plain decoding, static lengths, thresholds and auto in turn; Ctrl-C keeps what is finished.

    Example: dspark bench smollm2-135m --local --kinds copy-edit,story --html report.html
    """
    if not local:
        raise BadInput("bench measures on this machine only", hint=f"dspark bench {model} --local")
    if json and csv:
        raise BadInput("--json and --csv both print on stdout: ask for one of them, and --out FILE for the JSON")
    settings = replace(_settings(kinds, temperatures, prompts, tokens, repeats, seed), arms=_names(arms))
    for file in (html, out):
        if file is not None and not file.expanduser().absolute().parent.is_dir():
            raise BadInput(f"there is no folder {file.expanduser().absolute().parent} to write {file.name} to")
    pair = o.PairOptions(model, drafter, "auto", backend, quant, ctx, threads, gpu_layers, kv_type, flash_attn, offline)
    opened = o.open_options(pair)
    files = _formats(formats, opened.model)
    from dspark_cli.bench.local import Results
    from dspark_cli.bench.summary import as_csv, summarise

    results = Results()
    _measure(opened, files, settings, results)
    if not results.runs:
        raise typer.Exit(INTERRUPTED)
    summary = summarise(results)
    if json:
        typer.echo(json_.dumps(summary, ensure_ascii=False))
    elif csv:
        typer.echo(as_csv(summary), nl=False)
    else:
        print_table(summary)
    _write(out, json_.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    if html is not None:
        from dspark_cli.bench.report import as_html

        _write(html, as_html(summary))
    if results.interrupted:
        raise typer.Exit(INTERRUPTED)


def _settings(kinds: str | None, temperatures: str, prompts: int, tokens: int, repeats: int, seed: int) -> Settings:
    from dspark_cli.bench.local import Settings
    from dspark_cli.bench.prompts import KINDS

    wanted = [k.strip() for k in kinds.split(",")] if kinds else list(KINDS)
    for kind in wanted:
        if kind not in KINDS:
            raise BadInput(f"unknown kind of prompts {kind!r}: one of {', '.join(KINDS)}")
    try:
        values = tuple(float(t) for t in temperatures.split(","))
    except ValueError:
        raise BadInput(f"--temperatures takes numbers separated by commas, not {temperatures!r}") from None
    if any(not 0.0 <= t <= 10.0 for t in values):
        raise BadInput(f"--temperatures takes numbers from 0 to 10, not {temperatures!r}")
    return Settings(tuple(dict.fromkeys(wanted)), tuple(dict.fromkeys(values)), prompts, tokens, repeats, seed)


def _names(arms: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(a.strip() for a in arms.split(","))) if arms else ()


def _formats(wanted: str | None, source: Path) -> list[Path]:
    """Files of the targets to measure, made from `source`; `source` itself where no format is asked for."""
    from platformdirs import user_cache_path

    from dspark_cli.bench.formats import FORMATS, requantize

    if wanted is None:
        return [source]
    if source.is_dir():
        raise BadInput(f"--formats requantizes a GGUF file; {source.name} is a checkpoint folder", hint="no --formats")
    names = list(dict.fromkeys(name.strip().upper() for name in wanted.split(",")))
    for name in names:
        if name not in FORMATS:
            raise BadInput(f"unknown format {name!r}: one of {', '.join(FORMATS)}")
    files = []
    for name in names:
        typer.secho(f"target in {name}", dim=True, err=True)
        files.append(requantize(source, name, user_cache_path("dspark") / "formats"))
    return files


def _measure(opened: OpenOptions, files: list[Path], settings: Settings, results: Results) -> None:
    """Run with a bar on stderr; Ctrl-C ends it and keeps the finished cycles."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dspark_cli.bench.local import Progress as Step
    from dspark_cli.bench.local import run_all
    from dspark_cli.cli.lines import NowAndThen

    console, lines = Console(stderr=True), NowAndThen()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def show(step: Step) -> None:
            bar.update(task, total=step.total, completed=step.done, description=f"{step.format}, {step.what}")
            if not console.is_terminal and lines.due():
                typer.echo(f"{step.done} of {step.total}: {step.format}, {step.what}", err=True)

        try:
            run_all(opened, files, settings, results, show)
        except KeyboardInterrupt:
            results.interrupted = True
    if results.interrupted:
        typer.secho(f"interrupted: {len(results.runs)} finished runs are kept", err=True)


def print_table(summary: dict[str, Any]) -> None:
    """The rows as a table a person reads, one per format, kind and temperature."""
    from rich.console import Console
    from rich.table import Table

    from dspark_cli.bench.report import difference

    console = Console()
    for key in dict.fromkeys((r["format"], r["kind"], r["temperature"]) for r in summary["rows"]):
        rows = [r for r in summary["rows"] if (r["format"], r["kind"], r["temperature"]) == key]
        title = f"{summary['model']} {key[0]}, {key[1]}, temperature {key[2]:g}"
        table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for name in ("arm", "tok/s", "x plain", "95 %", "x best static", "tau", "verified", "parked", "output"):
            table.add_column(name, justify="left" if name in ("arm", "output") else "right", no_wrap=name != "output")
        for r in rows:
            best = "-" if r["ratio_to_best_static"] is None else f"{r['ratio_to_best_static']:.2f}"
            table.add_row(
                r["arm"] + (" *" if r["arm"] == r["best_static"] else ""),
                f"{r['decode_tok_s']:.1f}",
                f"{r['ratio_to_plain']:.2f}",
                f"{r['ratio_ci'][0]:.2f}-{r['ratio_ci'][1]:.2f}",
                best,
                f"{r['accepted_length']:.2f}",
                f"{r['verified_per_round']:.2f}",
                f"{r['parked_share']:.0%}",
                "identical" if r["identical"] else difference(r),
                style="bold" if r["arm"] == "auto" else None,
            )
        console.print(table)
        near = next((x for x in summary["oracle"] if (x["format"], x["kind"], x["temperature"]) == key), None)
        if near:
            console.print(
                f"oracle schedule {near['oracle_to_plain']:.2f}x plain; auto reaches {near['auto_to_oracle']:.2f} of it",
                style="dim",
                highlight=False,
            )
        console.print()


def _write(file: Path | None, text: str) -> None:
    if file is None:
        return
    try:
        file.expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise DsparkError(f"{file} cannot be written: {error.strerror}") from None
    typer.secho(f"wrote {file}", dim=True, err=True)
