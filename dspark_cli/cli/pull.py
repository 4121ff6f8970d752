"""`dspark pull`: download a pair."""

from __future__ import annotations

import json as json_
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.cli import options as o

if TYPE_CHECKING:
    from dspark_cli.registry.choose import Wish
    from dspark_cli.registry.obtain import Obtained
    from dspark_cli.registry.plan import MemoryPlan


def pull(
    model: Annotated[str, typer.Argument(help="Name from `dspark models`, or a Hub repository (owner/name).")],
    quant: o.Quant = None,
    drafter: Annotated[
        str, typer.Option(help="auto, dspark, dflash, eagle3, small, or none (target only).", metavar="KIND")
    ] = "auto",
    backend: o.Backend = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the target's repository.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Take the newest revision, not the one pulled before.")
    ] = False,
    ctx: o.Ctx = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Download target and drafter that fit this machine; what is here is checked against its hash.

    Interrupted downloads continue. Example: dspark pull qwen3-4b --quant Q4_K_M
    """
    o.go_offline(offline)
    from dspark_cli.cli.progress import make_report
    from dspark_cli.registry.obtain import pull as pull_pair
    from dspark_cli.registry.plan import size
    from dspark_cli.registry.resolve import looks_like_path

    if looks_like_path(model):
        raise BadInput(f"{model} is a path: only names and Hub repositories can be pulled", hint="dspark models")
    wish = o.wish(quant=quant, backend=backend, drafter=drafter, ctx=ctx)
    try:
        with make_report() as report:
            done = pull_pair(model, wish, report=report, revision=revision, update=update, verify=True)
    except KeyboardInterrupt:
        typer.echo("\nstopped: the same command continues where it is", err=True)
        raise
    choice = done.choice
    plan, notes = _plan_of_files(model, wish, done)
    if json:
        facts = {
            "model": choice.entry.name,
            "backend": choice.backend,
            "quant": choice.quant,
            "drafter": choice.drafter.repository if choice.drafter else None,
            "repositories": [{**vars(item), "paths": [str(path) for path in item.paths]} for item in done.pulled],
            "plan": plan.as_dict(),
            "notes": notes,
        }
        typer.echo(json_.dumps(facts, ensure_ascii=False))
        return
    for item in done.pulled:
        typer.echo(
            f"{item.repository} @ {item.revision[:12]}: {len(item.paths)} file{'s' if len(item.paths) > 1 else ''}, "
            f"{size(item.total)} ({size(item.downloaded)} downloaded)"
        )
    if not done.pulled:
        typer.echo(f"{choice.entry.name} is installed with the package {choice.entry.package}")
    typer.echo(f"plan: {plan.line()}")
    for note in notes:
        typer.echo(f"note: {note}")


def _plan_of_files(model: str, wish: Wish, done: Obtained) -> tuple[MemoryPlan, list[str]]:
    """The plan from the headers of what is here now, and the notes that still hold; else the estimate and why."""
    from dspark_cli.registry.devices import this_machine
    from dspark_cli.registry.resolve import plan_for, resolve

    machine = this_machine()
    try:
        found = resolve(model, wish.quant, wish, machine)
        return plan_for(found, machine, wish.options), list(found.noting(done.happened).notes)
    except DsparkError as error:
        return done.choice.plan, [*done.choice.notes, *done.happened, f"the plan is an estimate: {error}"]
