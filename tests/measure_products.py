"""What passes of a target cost with our products on a CPU and with ggml's own, in turn, a process each.

    python tests/measure_products.py [--formats F16,Q8_0] [--depths 64,600] [--repeats 3] [--threads N] [--target FILE.gguf]

Milliseconds of a pass by its tokens (medians over all repeats), and the tokens per second of a prompt of 512. Attention is what
`--flash-attn auto` chooses with each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np

from dspark_cli.backends.base import Row
from dspark_cli.bench.formats import requantize
from dspark_cli.registry import resolve

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16)
PROMPT = 512
SECONDS = 3.0  # a depth and repeat
ARMS = {"ggml's": "off", "ours": ""}


def measure(path: Path, depth: int, threads: int | None) -> dict[str, float]:
    """ms by width, and "prompt" in tokens per second, of this process."""
    from dspark_cli.backends.llamacpp.context import ContextOptions
    from dspark_cli.backends.llamacpp.target import LlamaCppTarget

    tokens = [int(token) for token in np.random.default_rng(0).integers(1000, 40000, max(depth, PROMPT) + max(WIDTHS))]
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    prompts = []
    with LlamaCppTarget(path, ContextOptions(ctx=2 * PROMPT + depth, threads=threads)) as target:
        for _ in range(3):
            target.rewind(0, 0)
            start = time.perf_counter()
            target.step([Row(0, tokens[:PROMPT], 1)])
            prompts.append(PROMPT / (time.perf_counter() - start))
        target.rewind(0, 0)
        target.step([Row(0, tokens[:depth], 1)])
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            for width in WIDTHS:
                for _ in range(2):  # the second: libllama has the graph of that width then
                    target.rewind(0, depth)
                    before = target.context.native_ms
                    target.step([Row(0, tokens[depth : depth + width])])
                times[width].append(target.context.native_ms - before)
    return {**{str(width): median(found) for width, found in times.items()}, "prompt": max(prompts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="F16,Q8_0,Q4_1")
    parser.add_argument("--depths", default="64,600")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--target", type=Path, help="instead of the embedded one; tests/random_target.py writes any size"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    depths = [int(word) for word in options.depths.split(",")]
    if options.child:
        print(json.dumps([measure(options.child, depth, options.threads) for depth in depths]))
        return
    columns = [*(str(width) for width in WIDTHS), "prompt"]
    print(f"| target | depth | products | {' | '.join(columns[:-1])} | prompt, tok/s |")
    print(f"|{'---|' * (len(columns) + 3)}")
    target = options.target or resolve("smollm2-135m").path
    with tempfile.TemporaryDirectory() as folder:
        for name in options.formats.split(","):
            path = requantize(target, name, Path(folder))
            found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
            for _ in range(options.repeats):
                for arm, switch in ARMS.items():
                    command = [sys.executable, __file__, "--child", str(path), "--depths", options.depths]
                    command += ["--threads", str(options.threads)] if options.threads else []
                    environment = os.environ | {"DSPARK_CPU_KERNELS": switch}
                    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                    for depth, one in zip(depths, json.loads(said), strict=True):
                        found[arm, depth].append(one)
            for depth in depths:
                for arm in ARMS:
                    middle = {key: median(one[key] for one in found[arm, depth]) for key in columns}
                    cells = [f"{middle[key]:.1f}" for key in columns[:-1]] + [f"{middle['prompt']:.0f}"]
                    print(f"| {name} | {depth} | {arm} | {' | '.join(cells)} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
