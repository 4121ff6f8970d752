"""What drafting costs a round on a CPU, by who computes the drafter's passes: libllama's graph, or our own kernels.

In a round's order, so that weights and graphs are as cold as they are in use: a verify pass, features of two tokens handed
over, a draft. Prints medians in ms, both in turn.

usage: python tests/measure_drafter.py [--format Q8_0] [--depth 200] [--rounds 150] [--drafter FILE.gguf]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from dspark_cli.backends.base import DraftRequest, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.bench.formats import requantize
from dspark_cli.registry import resolve

VERIFIED, TAKEN_IN = 3, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="Q8_0", help="of the target")
    parser.add_argument("--depth", type=int, default=200, help="tokens of context")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--drafter", type=Path)
    args = parser.parse_args()
    pair = resolve("smollm2-135m")
    path = args.drafter or pair.drafter_path
    assert path is not None
    target_path = requantize(pair.path, args.format, Path(tempfile.gettempdir()) / "dspark-formats")
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    with LlamaCppTarget(target_path, ContextOptions(ctx=args.depth + 64)) as target:
        drafters = {
            "libllama": LlamaCppDrafter(path, target, kernels=False),
            "kernels": LlamaCppDrafter(path, target),
        }
        target.request_features(drafters["kernels"].feature_layers)
        ids = list(range(1000, 1000 + args.depth))
        features = target.step([Row(0, ids, n_logits=1)])[0].features
        for drafter in drafters.values():
            drafter.observe(0, ids, features)
        for _ in range(args.rounds):
            for who, drafter in drafters.items():
                for block in range(1, drafter.block_size + 1):
                    output = target.step([Row(0, ids[:VERIFIED])])[0]
                    target.rewind(0, args.depth)
                    began = time.perf_counter()
                    drafter.observe(0, ids[:TAKEN_IN], output.features)
                    handed = time.perf_counter()
                    drafter.propose([DraftRequest(0, ids[0], block)])
                    times[who, f"draft of {block}"].append(time.perf_counter() - handed)
                    times[who, "features"].append(handed - began)
                    drafter.rewind(0, args.depth)
        print(
            f"{path.name} beside {target_path.name}, {args.depth} tokens of context, {target.context.threads} threads"
        )
        for who, drafter in drafters.items():
            print(f"{who} ({type(drafter.passes).__name__})")
            for (whose, what), seconds in times.items():
                if whose == who:
                    print(f"  {what:12} {1e3 * median(seconds):6.2f} ms")
            drafter.close()


if __name__ == "__main__":
    main()
