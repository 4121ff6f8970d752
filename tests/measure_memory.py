"""Peak growth of this process while a pair is loaded and used, beside what the plan says. Run by test_plan_measured.py.

usage: python measure_memory.py TARGET CTX [DRAFTER.gguf]    prints one JSON object
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil


def peak_rss() -> int:
    """Bytes; Linux's high-water mark, so nothing is missed between two looks."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM: this is not Linux")


def mapped_twice(path: Path) -> int:
    """Bytes of `path` that this process sees at two addresses (libllama's and our kernels'): counted twice, there once."""
    parts = psutil.Process().memory_maps(grouped=False)
    return max(0, sum(part.rss for part in parts if part.path == str(path.resolve())) - path.stat().st_size)


def main(target: Path, ctx: int, drafter: Path | None) -> None:
    import gguf  # noqa: F401  (what a session imports belongs to the baseline, not to the pair)
    import jinja2.sandbox  # noqa: F401

    from dspark_cli.backends.llamacpp import native
    from dspark_cli.engine.rounds import Request, SamplingOptions
    from dspark_cli.engine.session import OpenOptions, Session
    from dspark_cli.registry.devices import this_machine
    from dspark_cli.registry.plan import PlanOptions
    from dspark_cli.registry.resolve import Resolved, plan_for

    if target.is_dir():
        import torch

        import dspark_cli.backends.torch.target  # noqa: F401

        torch.ones(300, 300) @ torch.ones(300, 300)
    else:
        native.start()
    machine = this_machine()
    plan = plan_for(Resolved(target.stem, target, drafter), machine, PlanOptions(ctx=ctx))
    before = psutil.Process().memory_info().rss
    word = "auto" if drafter is None else str(drafter)
    options = OpenOptions(target, target.stem, drafter=word, policy="fixed:4", ctx=ctx)
    with Session.open(options) as session:
        n_vocab = session.target.info.n_vocab
        # The context is filled: scores are written for as much of it as is used.
        prompt = [5 + i * 7919 % (n_vocab - 10) for i in range(ctx - 64)]
        request = Request(prompt, 24, SamplingOptions())
        for _ in session.run(request):
            pass
        grown = peak_rss() - before - (0 if target.is_dir() else mapped_twice(target))
    print(json.dumps({"grown": grown, "planned": plan.total, "plan": plan.as_dict()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
