"""`dspark calibrate`: what passes cost here, what the drafter's confidence is worth, and the schedule that follows."""

from __future__ import annotations

import json as json_
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.cli import options as o

if TYPE_CHECKING:
    from pathlib import Path

    from dspark_cli.bench.recorded import Halves
    from dspark_cli.engine.calibration import Sts
    from dspark_cli.engine.costs import CostModel
    from dspark_cli.engine.session import Session


WIDEST = 16  # tokens of a pass whose logits are compared: more are hardly ever verified


def calibrate(
    model: o.Model,
    rounds: Annotated[int, typer.Option(min=20, help="Rounds to record for the confidence.")] = 800,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens per recorded answer.")] = 128,
    temperature: o.Temperature = 0.0,
    json: o.Json = False,
    drafter: o.Drafter = "auto",
    backend: o.Backend = "auto",
    quant: o.Quant = None,
    ctx: o.Ctx = None,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = None,
    kv_type: o.KvType = "f16",
    flash_attn: o.FlashAttn = "auto",
    offline: o.Offline = False,
) -> None:
    """Measure this machine's costs anew and fit the drafter's confidence; both are used from then on.

    Example: dspark calibrate smollm2-135m
    """
    if drafter == "none":
        raise BadInput("without a drafter there is nothing to calibrate", hint=f"dspark calibrate {model}")
    pair = o.PairOptions(model, drafter, "auto", backend, quant, ctx, threads, gpu_layers, kv_type, flash_attn, offline)
    opened = o.open_options(pair)
    from dspark_cli.engine.runners import time_runners
    from dspark_cli.engine.session import Session

    runners = time_runners(opened.drafter_file, opened.model, opened.context())
    with Session.open(opened, measure_anew=True) as session:
        costs = session.costs
        halves = _record(session, rounds, tokens, temperature)
        found = _findings(session, costs, halves)
        apart = session.widths_apart([n for n in costs.verify.known if n <= WIDEST])
        found["logits_apart"] = {d: {n: round(rms, 6) for n, rms in by.items()} for d, by in apart.items()}
        found["costs"]["draft_ms_by"] = None if runners is None else {k: round(v, 3) for k, v in runners.items()}
        file = opened.drafter_file if session.drafter is not None and session.drafter.has_pass else None
        found["written"] = _save(file, halves, found["_sts"])
    del found["_sts"]
    if json:
        typer.echo(json_.dumps(found, ensure_ascii=False))
    else:
        print_findings(found)


def _record(session: Session, rounds: int, tokens: int, temperature: float) -> Halves:
    from rich.console import Console
    from rich.progress import Progress

    from dspark_cli.bench.recorded import drafter_alone, record

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("recording rounds", total=rounds)
        return record(
            session,
            drafter_alone(session),
            rounds=rounds,
            tokens=tokens,
            temperatures=(temperature,),
            progress=lambda done, wanted: bar.update(task, completed=done),
        )


def _findings(session: Session, costs: CostModel, halves: Halves) -> dict[str, Any]:
    from dspark_cli.bench.recorded import PATTERNS, calibrate, drafter_alone, expected_speed, schedule_for

    sts, confidence = calibrate(halves)
    block = drafter_alone(session).pass_block
    survival = halves.held_out.survival() if len(halves.held_out) else []
    info = session.target.info
    plain = costs.plain_ms(1, 256)
    curve = costs.verify_ms(1, 256, max(costs.verify.known))
    return {
        "model": info.name,
        "format": info.format,
        "drafter": session.drafter.name if session.drafter else None,
        "costs": {
            "plain_ms": round(plain, 3),
            "verify_ms": {n: round(curve[n], 3) for n in costs.verify.known},
            "switch_ms": round(costs.switch_ms, 3),
            "draft_ms": round(costs.pass_ms(1, block, 256), 3),
            "kept": session.profile is not None and session.profile.path.exists(),
        },
        "confidence": confidence,
        "survival": [round(s, 4) for s in survival],
        "schedule": [schedule_for(costs, c, block) for c in PATTERNS],
        "expected": expected_speed(costs, survival, block) if survival else None,
        "_sts": sts,
    }


def _save(drafter: Path | None, halves: Halves, sts: Sts) -> str | None:
    """Keep the calibration of a drafter that is a file; lookup's confidence is its own record already."""
    from dspark_cli.engine.beliefs import CalibrationFile, own_path, sha256_of

    if drafter is None or not len(halves.fit):
        return None
    path = own_path(drafter)
    survival = tuple(halves.fit.survival())
    try:
        CalibrationFile(sha256_of(drafter), halves.source, sts.temperatures, survival, len(halves.fit)).save(path)
    except OSError as error:
        raise DsparkError(f"{path} cannot be written: {error.strerror}") from None
    return str(path)


def print_findings(found: dict[str, Any]) -> None:
    """For people: the curve, reliability before and after, the schedule that follows."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    costs, confidence = found["costs"], found["confidence"]
    plain = costs["verify_ms"].get(1, costs["plain_ms"])
    apart = found["logits_apart"]
    off_by = (f"off by, {depth} tokens in" for depth in apart)
    table = Table(
        "tokens", "ms", "x one token", *off_by, title="verify pass", title_justify="left", box=None, pad_edge=False
    )
    for n, ms in costs["verify_ms"].items():
        off = ("-" if n not in by else "0" if by[n] == 0 else f"{by[n]:.2g}" for by in apart.values())
        table.add_row(str(n), f"{ms:.1f}", f"{ms / plain:.2f}", *off)
    console.print(table)
    console.print(f"off by: from the logits of single tokens (RMS); {_bits(apart)}", highlight=False)
    if costs["switch_ms"]:
        console.print(
            f"another number of tokens than in the pass before: {costs['switch_ms']:.1f} ms more", highlight=False
        )
    kept = "kept" if costs["kept"] else "not kept"  # a notice said why
    by = costs["draft_ms_by"]
    runners = "" if by is None else " (" + ", ".join(f"{name} {ms:.2f}" for name, ms in by.items()) + ")"
    console.print(f"draft pass {costs['draft_ms']:.2f} ms{runners}; {kept}\n", highlight=False)

    title = (
        f"{confidence['source']}: ECE {confidence['ece_before']:.3f} as the drafter says, "
        f"{confidence['ece_after']:.3f} after STS ({confidence['rounds_held_out']} held-out rounds)"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("position", "rounds", "accepted", "ECE before", "ECE after", "AUC", "temperature"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(confidence["positions"]):
        temperatures = confidence["temperatures"]
        table.add_row(
            str(row["position"]),
            str(row["rounds"]),
            f"{row['survival']:.0%}",
            f"{row['ece_before']:.3f}",
            f"{row['ece_after']:.3f}",
            "-" if row["auc"] is None else f"{row['auc']:.2f}",
            f"{temperatures[i]:.2f}" if i < len(temperatures) else "-",
        )
    console.print(table)
    if not confidence["used"]:
        console.print(
            "STS is not used: temperatures at the edge of the grid, or the drafter's own confidence is at least as good "
            f"(Brier {confidence['brier_before']:.3f}, with STS {confidence['brier_after']:.3f})",
            highlight=False,
        )
    console.print()
    table = Table("confidence of every token", "verify", "speed", title="what follows", title_justify="left", box=None)
    for row in found["schedule"]:
        table.add_row(f"{row['confidence']:.2f}", str(row["verify"]), f"{row['speed']:.2f}x")
    console.print(table)
    if found["expected"]:
        console.print(
            f"expected with the acceptance seen here: {found['expected']['speed']:.2f}x plain decoding", highlight=False
        )
    if found["written"]:
        typer.secho(f"wrote {found['written']}", dim=True, err=True)


def _bits(apart: dict[int, dict[int, float]]) -> str:
    """What it means for greedy answers that logits depend on the width of a pass, or do not."""
    if not any(rms for by in apart.values() for rms in by.values()):
        return "0: greedy answers are those of plain decoding, bit for bit"
    return "where it is not 0, words whose logits lie that near may swap"
