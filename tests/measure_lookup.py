"""How often lookup is right, by the length of the match and by what the two latest places say: the prior in backends/lookup.py.

    python tests/measure_lookup.py DOCUMENTS

DOCUMENTS is the file `documents.jsonl` of a folder of `dspark train`: texts that the model wrote itself. Each answer is gone
through token by token; of every draft, positions count up to the first wrong one.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

from dspark_cli.backends.base import DraftRequest
from dspark_cli.backends.lookup import PRIOR, LookupDrafter

BLOCK = 8
WORDS = ("one place only", "two that agree", "two that do not")


def count(ids: list[int], start: int, right: np.ndarray, seen: np.ndarray) -> None:
    drafter = LookupDrafter()
    drafter.observe(0, ids[: start - 1], None)
    history = drafter._histories[0]
    for at in range(start, len(ids)):
        history.open = None
        drafter.propose([DraftRequest(0, ids[at - 1], BLOCK)])
        if history.open is not None:
            proposal = history.open
            for k, token in enumerate(proposal.tokens[: len(ids) - at]):
                cell = proposal.cells[k]
                seen.flat[cell] += 1
                right.flat[cell] += token == ids[at + k]
                if token != ids[at + k]:
                    break
        drafter.observe(0, [ids[at - 1]], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--count", type=int, default=1500, help="documents of each kind (default 1500)")
    options = parser.parse_args()
    documents = [json.loads(line) for line in options.documents.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(documents)
    for kind, greedy in (("greedy", True), ("sampled", False)):
        right, seen = np.zeros(PRIOR.shape), np.zeros(PRIOR.shape)
        for document in [d for d in documents if (d["temperature"] == 0) == greedy][: options.count]:
            count(document["ids"], document["answer_start"], right, seen)
        print(f"{kind} answers, by bucket of match length")
        for i, words in enumerate(WORDS):
            cells = [f"{r / n:.2f} ({n:.0f})" if n else "-" for r, n in zip(right[i], seen[i], strict=True)]
            print(f"  {words:16} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
