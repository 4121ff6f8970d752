"""What passes cost with flash attention and without it, by the tokens of the pass and the depth of the context.

    python tests/measure_attention.py --format Q8_0

Prints medians in ms, the variants in turn, and the speed of a prompt of 1,024 tokens. Not part of the test suite.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import gettempdir

import numpy as np

from dspark_cli.backends.base import Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.bench.formats import requantize
from dspark_cli.registry import resolve

DEPTHS, WIDTHS = (32, 150, 700), (1, 2, 3, 4, 5)


def pass_ms(target: LlamaCppTarget, ids: list[int], depth: int) -> float:
    began = time.perf_counter()
    target.step([Row(0, ids)])
    took = time.perf_counter() - began
    target.rewind(0, depth)
    return took * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="Q8_0", help="requantize the target to this first (default Q8_0)")
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    path = requantize(resolve("smollm2-135m").path, options.format, Path(gettempdir()) / "dspark-formats")
    ids = np.random.default_rng(0).integers(100, 40_000, 1024).tolist()
    targets = {flash: LlamaCppTarget(path, ContextOptions(ctx=2048, flash_attn=flash)) for flash in ("on", "off")}
    for depth in DEPTHS:
        found: dict[tuple[str, int], list[float]] = {}
        for target in targets.values():
            target.drop(0)
            target.step([Row(0, ids[:depth], n_logits=1)])
        for _ in range(options.repeats):
            for flash, target in targets.items():
                for width in WIDTHS:
                    times = [pass_ms(target, ids[7 : 7 + width], depth) for _ in range(6)]
                    found.setdefault((flash, width), []).extend(times[1:])
        for flash in targets:
            figures = " ".join(f"{median(found[flash, width]):6.1f}" for width in WIDTHS)
            print(
                f"depth {depth:4}, flash attention {flash:3}: {figures} ms for {WIDTHS[0]}-{WIDTHS[-1]} tokens",
                flush=True,
            )
    for flash, target in targets.items():
        target.drop(0)
        began = time.perf_counter()
        for begin in range(0, 1024, 512):
            target.step([Row(0, ids[begin : begin + 512], n_logits=1)])
        print(f"flash attention {flash:3}: {1024 / (time.perf_counter() - began):.0f} tok/s of a prompt of 1024 tokens")
        target.close()


if __name__ == "__main__":
    main()
