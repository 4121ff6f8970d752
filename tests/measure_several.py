"""What drafting for several sequences costs, by who runs the drafter: ms of a pass with the features of a round taken in.

    python tests/measure_several.py --sequences 1,8,16 --depth 128

The embedded pair; one session holds as many sequences as the largest number asks for. Medians, numbers of sequences in turn.
Ends with the peak memory of the process: compare `--runners llamacpp` with `--runners torch`.
"""

from __future__ import annotations

import argparse
import time
from resource import RUSAGE_SELF, getrusage
from statistics import median

import numpy as np

from dspark_cli.backends.base import DraftRequest, Row
from dspark_cli.engine.profile import TAKEN_IN
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.registry import resolve

REPEATS = 9


def measure(runner: str, counts: list[int], depth: int) -> dict[int, tuple[float, float]]:
    """Sequences -> (ms of the pass, ms of taking in)."""
    found = resolve("smollm2-135m")
    options = OpenOptions(
        found.path,
        found.name,
        drafter_path=found.drafter_path,
        drafter_backend=runner,
        policy="fixed:1",
        n_seq=max(counts),
        ctx=2 * depth + 64,
    )
    with Session.open(options) as session:
        target, drafter = session.target, session.drafter
        assert drafter is not None
        target.request_features(drafter.feature_layers)
        ids = np.random.default_rng(0).integers(0, target.info.n_vocab, size=depth).tolist()
        features = target.step([Row(0, ids, n_logits=1)])[0].features
        assert features is not None
        features = features.copy()
        for seq in range(max(counts)):
            drafter.observe(seq, ids, features)
        samples: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
        for _ in range(REPEATS):
            for count in counts:
                for seq in range(count):
                    drafter.observe(seq, ids[:TAKEN_IN], features[:TAKEN_IN])
                taken, began = drafter.inject_ms, time.perf_counter()
                drafter.propose([DraftRequest(seq, ids[0], drafter.pass_block) for seq in range(count)])
                inject = drafter.inject_ms - taken
                samples[count].append(((time.perf_counter() - began) * 1e3 - inject, inject))
                for seq in range(count):
                    drafter.rewind(seq, depth)
    return {n: (median(p for p, _ in s[1:]), median(i for _, i in s[1:])) for n, s in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="1,2,4,8,16")
    parser.add_argument("--depth", type=int, default=128, help="cached tokens of each (default 128)")
    parser.add_argument("--runners", default="llamacpp,torch")
    options = parser.parse_args()
    counts = [int(n) for n in options.sequences.split(",")]
    for runner in options.runners.split(","):
        for count, (draft, inject) in measure(runner, counts, options.depth).items():
            print(f"{runner:9} {count:3} sequences  draft {draft:6.1f} ms  taking in {inject:5.1f} ms")
    print(f"peak memory {getrusage(RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")  # kB on Linux


if __name__ == "__main__":
    main()
