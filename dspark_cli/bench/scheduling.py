"""What deciding costs: time of one round of policy `auto` outside all passes.

    python -m dspark_cli.bench.scheduling

Each figure is the median over rounds of everything the policy does in a round (draft? how much to verify? what was learned).
"cold" is the same where other memory was read between rounds, as the passes of a model do.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from statistics import median, quantiles

import numpy as np

from dspark_cli.backends.base import EMPTY_DRAFT, Draft
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.decode import judge
from dspark_cli.engine.guard import Guard
from dspark_cli.engine.rounds import Times

SWEPT_BYTES = 64 << 20  # read and written before a cold round: more than caches hold
COLD_ROUNDS = 200
LIMITS_US = {1: 50.0, 64: 1000.0}  # what a round may take, by number of requests


def costs(widest: int) -> CostModel:
    """A jagged curve, so flat that much is verified; another number of tokens than the last costs extra, as in llama.cpp."""
    verify = {n: 10.0 + 0.05 * n + 0.3 * (n % 3) for n in range(1, widest + 1)}
    return CostModel(Curve(verify), draft=Curve({1: 1.0, 16: 1.5}), switch_ms=0.6)


def round_us(requests: int, gamma: int, *, sampled: bool, rounds: int, cold: bool = False) -> list[float]:
    """Microseconds of the policy in each of `rounds` rounds; `cold`: nothing of it is in the caches."""
    swept = np.zeros(SWEPT_BYTES // 8) if cold else np.zeros(0)
    random = np.random.default_rng(0)
    # Drafting and verifying every round: rounds that are parked, or only watch, are quicker.
    schedule = AutoSchedule(costs(requests * (gamma + 1)), guard=partial(Guard, patience=(1e9, 1e9), trusted=True))
    tokens, probs = np.arange(gamma), np.zeros((gamma, 4), dtype=np.float32) if sampled else None
    times = []
    for _ in range(rounds):
        conf = random.uniform(0.5, 1.0, size=(requests, gamma)).astype(np.float32)
        drafts = [Draft(tokens, conf[i], probs, "dspark") for i in range(requests)]
        accepted = (random.random((requests, gamma)) < conf).cumprod(axis=1).sum(axis=1).tolist()
        swept += 1.0
        began = time.perf_counter()
        blocks = schedule.block([gamma] * requests, 500.0)
        schedule.passes(blocks, [EMPTY_DRAFT] * requests)
        lengths = schedule.choose(drafts)
        between = time.perf_counter()
        outcomes = [judge(d, n, min(n, a), -1) for d, n, a in zip(drafts, lengths, accepted, strict=True)]
        verify = 10.0 + 0.05 * sum(lengths)
        learning = time.perf_counter()
        schedule.observe(outcomes, Times(1.5, verify, 0.3, 0.2))
        times.append((between - began + time.perf_counter() - learning) * 1e6)
    return times[rounds // 10 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=int, default=16, help="tokens drafted per request (default 16)")
    parser.add_argument("--rounds", type=int, default=2000, help="rounds per figure (default 2000)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    rows = []
    for requests, limit in LIMITS_US.items():
        for sampled in (False, True):
            us = round_us(requests, options.gamma, sampled=sampled, rounds=max(200, options.rounds // requests))
            cold = round_us(requests, options.gamma, sampled=sampled, rounds=COLD_ROUNDS, cold=True)
            drafts = "sampled" if sampled else "deterministic"
            rows.append(
                {
                    "requests": requests,
                    "gamma": options.gamma,
                    "drafts": drafts,
                    "median_us": round(median(us), 1),
                    "p90_us": round(quantiles(us, n=10)[-1], 1),
                    "cold_us": round(median(cold), 1),
                    "limit_us": limit,
                }
            )
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"R={row['requests']:<3} gamma={row['gamma']} {row['drafts']:14} median {row['median_us']:7.1f} us  "
            f"p90 {row['p90_us']:7.1f} us  cold {row['cold_us']:7.1f} us  (limit {row['limit_us']:.0f})"
        )


if __name__ == "__main__":
    main()
