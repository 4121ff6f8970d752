"""Policy `auto` with the worst and the best drafter there can be, on the real target: run by hand, on a quiet machine.

    python tests/measure_extremes.py --format Q4_1

"useless": random weights, the real cost of a pass, a confidence head that says anything. "oracle": the same pass at the same
cost, but it drafts what plain decoding is known to say. Fresh schedules for every answer: nothing was learned before.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

from dspark_cli.backends.base import Draft, Drafter, DraftRequest
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.bench.arms import PLAIN, Arm, answer
from dspark_cli.bench.formats import requantize
from dspark_cli.bench.prompts import KINDS
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.rounds import Round, SamplingOptions
from dspark_cli.engine.schedule import Off
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.engine.stats import Stats
from synthetic import SPEC, random_tensors, target_path, write

PLAIN_ARM = Arm(PLAIN, None, Off())


class OracleDrafter(CombinedDrafter):
    """Pays for the model's pass and drafts the known answer."""

    def __init__(self, model: Drafter, known: Sequence[int]) -> None:
        super().__init__(model)
        self._known = list(known)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = super().propose(requests)
        position = self._length[requests[0].seq] + 1  # of the first token after the anchor
        tokens = np.asarray(self._known[position : position + len(drafts[0])], dtype=np.int64)
        return [Draft(tokens, np.full(len(tokens), 0.9, dtype=np.float32), source="oracle")]


def speed(rounds: Sequence[Round]) -> float:
    return Stats.of(rounds).decode_tok_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="Q4_1", help="requantize the target to this first (default Q4_1: as it is)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per answer (default 200)")
    parser.add_argument("--repeats", type=int, default=3, help="cycles per prompt (default 3)")
    options = parser.parse_args()
    source = target_path()
    path = (
        source
        if options.format == "Q4_1"
        else requantize(source, options.format, Path(gettempdir()) / "dspark-formats")
    )
    spec = replace(SPEC, draft_vocab=8192)
    with TemporaryDirectory() as folder:
        file = write(Path(folder), random_tensors(spec), spec, quant="Q8_0")
        opened = OpenOptions(
            path, path.stem, drafter=str(file), policy="auto", notice=lambda text: print(text, file=sys.stderr)
        )
        with Session.open(opened) as session:
            report(session, options.tokens, options.repeats)


def report(session: Session, tokens: int, repeats: int) -> None:
    assert isinstance(session.drafter, CombinedDrafter)
    model, measured = session.drafter.model, session.costs.as_dict()

    def fresh() -> AutoSchedule:
        return AutoSchedule(CostModel.from_dict(measured), label=session.target.info.format)

    ratios: dict[str, list[float]] = {"useless": [], "oracle": []}
    full = later = parked = rounds = 0
    for prompt in [p for kind in KINDS.values() for p in kind[:1]]:
        # Fixed in length: an answer may go on past its end.
        request = replace(prompt.request(session, tokens, SamplingOptions()), stop_ids=frozenset())
        for _ in range(repeats):
            before = answer(session.target, PLAIN_ARM, request)
            known = [*request.prompt, *(t for item in before for t in item.tokens)]
            useless = answer(session.target, Arm("useless", CombinedDrafter(model), fresh()), request)
            oracle = answer(session.target, Arm("oracle", OracleDrafter(model, known), fresh()), request)
            plain = (speed(before) + speed(answer(session.target, PLAIN_ARM, request))) / 2
            ratios["useless"].append(speed(useless) / plain)
            ratios["oracle"].append(speed(oracle) / plain)
            parked += sum(r.parked is not None for r in useless)
            rounds += len(useless) - 1
            steady = [r for r in oracle[1:-2] if r.drafted == model.block_size][10:]
            full, later = full + sum(r.verified == r.drafted for r in steady), later + len(steady)
    for name, values in ratios.items():
        spread = f"worst answer {min(values):.3f}, best {max(values):.3f}"
        print(f"{name:8} {median(values):.3f}x plain ({spread}), {len(values)} answers")
    print(f"useless drafter parked in {parked / max(1, rounds):.0%} of rounds")
    print(f"oracle drafter: full blocks verified in {full / max(1, later):.0%} of rounds after the first ten")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
