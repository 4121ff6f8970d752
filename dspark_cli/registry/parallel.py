"""How many sequences a pair may decode at once: as many as pay on such machines, fewer where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_cli.backends.errors import BadInput, NotReady
from dspark_cli.registry.plan import MemoryPlan, PlanOptions, size

if TYPE_CHECKING:
    from dspark_cli.registry.choose import Machine
    from dspark_cli.registry.resolve import Resolved

#: few values, so that the cost profile of each is measured once; more than 16 was never measured
LADDER = (1, 2, 4, 8, 16)
LARGEST = 256  # sequences that libllama opens at most


def plan_parallel(
    found: Resolved,
    machine: Machine,
    options: PlanOptions,
    drafter: Path | None = None,
    *,
    n_seq: int | None,
    most: int = LADDER[-1],
) -> MemoryPlan:
    """The plan for `n_seq` sequences; None: the most of LADDER that fit, and not more than `most` of them need.

    Raises NotReady, with what would fit, when `n_seq` do not; look at `fits` otherwise.
    """
    from dspark_cli.registry.resolve import plan_for

    return choose(lambda n: plan_for(found, machine, replace(options, n_seq=n), drafter), found.name, n_seq, most)


def choose(plan: Callable[[int], MemoryPlan], name: str, n_seq: int | None, most: int) -> MemoryPlan:
    """`plan_parallel` over any way to make a plan for a number of sequences."""
    if n_seq is None:
        enough = next((n for n in LADDER if n >= most), LADDER[-1])
        plans = (plan(n) for n in reversed(LADDER) if n <= enough)
        return next((p for p in plans if p.fits), None) or plan(1)
    if not 1 <= n_seq <= LARGEST:
        raise BadInput(f"--parallel {n_seq} is not between 1 and {LARGEST}")
    wanted = plan(n_seq)
    if wanted.fits or not plan(1).fits:
        return wanted
    fitting = next(n for n in range(n_seq - 1, 0, -1) if plan(n).fits)
    raise NotReady(
        f"{name} with {n_seq} sequences of {wanted.ctx} tokens needs {size(wanted.total)} on {wanted.device.name}, "
        f"{size(wanted.device.usable)} can be used",
        hint=f"--parallel {fitting}, or a smaller --ctx",
    )
