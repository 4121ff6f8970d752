"""How fast lookup copies: an answer that repeats a passage of its prompt, against plain decoding in the same process.

    python -m dspark_cli.bench.copying --format F16

Prints tok/s of each arm, the ratio to plain run by run, the time outside native passes, and whether the ids are equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from tempfile import gettempdir

from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.bench.arms import PLAIN, Arm, measure, paired_ratios
from dspark_cli.bench.formats import requantize
from dspark_cli.engine.rounds import Request
from dspark_cli.engine.schedule import Fixed, Off, Threshold
from dspark_cli.registry import resolve

PASSAGES = (
    "The ferry left the northern pier at seven, carrying nine passengers, two bicycles and a crate of early apples. "
    "Halfway across, the engine coughed twice and fell silent, and the captain, who had seen worse, asked everybody "
    "to move to the left side while he looked for the spare belt. It took him eleven minutes. Nobody complained.",
    "def total(prices, tax):\n    amount = 0\n    for price in prices:\n        amount = amount + price\n"
    "    amount = amount + amount * tax\n    return amount\n\n\ndef largest(prices):\n    best = prices[0]\n"
    "    for price in prices:\n        if price > best:\n            best = price\n    return best\n",
)


def prompt(passage: str) -> str:
    """The passage, twice whole and once begun: even a very small model goes on copying."""
    return f"{passage}\n\n{passage}\n\n{passage[: len(passage) // 6]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--format", default="F16", help="requantize the target to this first (default F16)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per answer (default 96)")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs per arm (default 5)")
    options = parser.parse_args()
    path = requantize(resolve(options.model).path, options.format, Path(gettempdir()) / "dspark-formats")
    with LlamaCppTarget(path) as target:
        arms = [
            Arm(PLAIN, None, Off()),
            *(Arm(f"lookup fixed:{n}", LookupDrafter(), Fixed(n)) for n in (4, 8, 16)),
            Arm("lookup threshold:0.5", LookupDrafter(), Threshold(0.5)),
        ]
        requests = [Request(target.tokenizer.encode(prompt(p), bos=True), options.tokens) for p in PASSAGES]
        results = measure(target, arms, requests, repeats=options.repeats)
    print(
        f"{path.name}, {len(requests)} passages, {options.tokens} tokens, {options.repeats} runs per arm, interleaved"
    )
    print(f"{'arm':22} {'tok/s':>8} {'ratio (min-max)':>22} {'tau':>6} {'own ms/round':>13}  ids")
    for arm in arms:
        stats = [s for m in results[arm.name] for s in m.stats]
        ratios = paired_ratios(results, arm.name)
        same = all(a.tokens == b.tokens for a, b in zip(results[arm.name], results[PLAIN], strict=True))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{arm.name:22} {median(s.decode_tok_s for s in stats):8.1f} {spread:>22} "
            f"{median(s.accepted_length for s in stats):6.2f} {median(s.own_ms_per_round for s in stats):13.3f}  "
            f"{'identical' if same else 'DIFFERENT'}"
        )


if __name__ == "__main__":
    main()
