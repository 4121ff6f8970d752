"""Which backend runs a pair, and why: the line that every command prints."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dspark_cli.registry.choose import FULL_PRECISION, Machine, Wish
from dspark_cli.registry.plan import MemoryPlan, make_plan, size

if TYPE_CHECKING:
    from dspark_cli.registry.resolve import Resolved

NAMES = {"torch": "torch", "llamacpp": "llama.cpp"}


def backend_line(found: Resolved, plan: MemoryPlan, machine: Machine, wish: Wish) -> str:
    """ "backend llama.cpp on cpu: ..." for what was found and planned."""
    return f"backend {NAMES[plan.backend]} on {plan.device.name}: {_why(found, plan, machine, wish)}"


def _why(found: Resolved, plan: MemoryPlan, machine: Machine, wish: Wish) -> str:
    if found.resolution is None or found.entry is None:
        what = "a checkpoint folder runs" if plan.backend == "torch" else "a GGUF file runs"
        return f"{what} through {NAMES[plan.backend]}"
    if plan.backend == "torch":
        asked = f"--backend {wish.backend}; " if wish.backend != "auto" else ""
        return f"{asked}the full-precision pair fits ({size(plan.total)} of {size(plan.device.free)} free)"
    if wish.backend == "llamacpp" or wish.quant not in (None, FULL_PRECISION):
        return f"--backend {wish.backend}" if wish.backend == "llamacpp" else f"--quant {wish.quant} is a GGUF"
    return _why_not_torch(found, machine, wish)


def _why_not_torch(found: Resolved, machine: Machine, wish: Wish) -> str:
    """What keeps the full-precision pair from running."""
    entry = found.entry
    assert entry is not None
    if not entry.safetensors:
        return "no full-precision checkpoint of it is known"
    if not machine.torch:
        return "torch is not installed"
    able = [device for device in machine.accelerators if "torch" in device.runs]
    if not able:
        return "torch has no GPU here, and a quant is faster on a CPU"
    taken = found.resolution.drafter if found.resolution else None
    drafter = next((d for d in entry.drafter if d.usable and d.format == "safetensors"), None)
    if drafter is None and taken is not None:
        return f"its drafter {taken.repository or taken.builtin} is a GGUF, which drafts beside a GGUF"
    options = replace(wish.options, ctx=wish.options.ctx or found.resolution.plan.ctx if found.resolution else None)
    beside = entry.drafter_size(drafter) if taken is not None and drafter is not None else None
    full = make_plan(able[0], "torch", entry.size_at(FULL_PRECISION), beside, options, host_free=machine.cpu.usable)
    if not full.fits:
        return f"in full precision it needs {size(full.total)}, {able[0].name} can give {size(able[0].usable)}"
    if FULL_PRECISION not in wish.here and entry.checkpoint() is None:
        return f"its checkpoint is not on this disk (dspark pull {entry.name} --quant {FULL_PRECISION} brings it)"
    return "its GGUF is what was chosen"
