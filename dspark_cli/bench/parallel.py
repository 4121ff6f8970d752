"""Aggregate speed against the number of sequences: the same prompts decoded by R at once, plain, fixed and `auto`.

    python -m dspark_cli.bench.parallel --formats F16,Q8_0 --parallel 1,2,4,8,16

Arms run in turn in one process, forth and back; a ratio is taken inside a repeat. Prompts are computed in each run, mixed
with decoding as `dspark batch` does it: `tok/s` is tokens over the time of the whole run, prompts included; `decoding` leaves
their share of the passes out. Answers end at different lengths, and each sequence is filled several times, as in real work:
where all begin and end together plain decoding alone keeps every sequence busy to the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import gettempdir
from typing import Any

from dspark_cli.backends.machine import processor
from dspark_cli.bench.arms import PLAIN, Arm
from dspark_cli.bench.formats import requantize
from dspark_cli.bench.local import AUTO, arms_of
from dspark_cli.bench.prompts import KINDS
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.session import OpenOptions, Session, first_difference
from dspark_cli.engine.stats import Stats
from dspark_cli.registry import resolve

MIX = ("question", "code", "copy-edit", "story")
FIXED = ("fixed:2", "fixed:4")
FILLED = 4  # times each sequence at least
LENGTHS = (0.5, 1.25, 0.75, 1.5)  # of an answer, in shares of what is asked for


@dataclass
class Run:
    """One arm over all prompts. `seconds`: of the whole run, prompts included."""

    stats: Stats
    seconds: float
    answers: dict[int, list[int]]
    margins: dict[int, list[float]]

    @property
    def tok_s(self) -> float:
        return self.stats.tokens / self.seconds


@dataclass
class Cell:
    """All runs of one arm at one number of sequences."""

    runs: list[Run] = field(default_factory=list)

    def ratios(self, base: Cell, decoding: bool = False) -> list[float]:
        """Speed over `base`, repeat by repeat."""
        pairs = zip(self.runs, base.runs, strict=True)
        if decoding:
            return [a.stats.decode_tok_s / b.stats.decode_tok_s for a, b in pairs]
        return [a.tok_s / b.tok_s for a, b in pairs]


def requests_of(session: Session, count: int, tokens: int) -> list[Request]:
    """`count` requests of all kinds, no two alike, for `tokens` tokens each on average; only the limit ends them."""
    requests = []
    for i in range(count):
        kind, turn = MIX[i % len(MIX)], i // len(MIX)
        prompt = KINDS[kind][turn % len(KINDS[kind])]
        limit = max(1, round(tokens * LENGTHS[(i + turn) % len(LENGTHS)]))
        numbered = replace(prompt, text=f"Item {i + 1}.\n{prompt.text}")
        requests.append(replace(numbered.request(session, limit, SamplingOptions()), id=i, stop_ids=frozenset()))
    return requests


@contextmanager
def at_most(session: Session, n_seq: int) -> Iterator[None]:
    """Use only the first `n_seq` sequences."""
    info = session.target.info
    session.target.info = replace(info, n_seq=n_seq)
    try:
        yield
    finally:
        session.target.info = info


def run(session: Session, arm: Arm, requests: Sequence[Request]) -> Run:
    """All `requests` from empty caches."""
    for seq in range(session.target.info.n_seq):
        session.target.drop(seq)
        if arm.drafter is not None:
            arm.drafter.drop(seq)
    if arm.drafter is None:
        session.target.request_features(())
    engine = Engine(session.target, arm.drafter, arm.schedule, margins=arm.name == PLAIN)
    began = time.perf_counter()
    rounds = list(engine.run(requests))
    seconds = time.perf_counter() - began
    return Run(Stats.of(rounds), seconds, _by_request(rounds, "tokens"), _by_request(rounds, "margins"))


def _by_request(rounds: Sequence[Round], what: str) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for item in rounds:
        found.setdefault(item.request, []).extend(getattr(item, what) or ())
    return found


def measure(session: Session, names: Sequence[str], requests: Sequence[Request], repeats: int) -> dict[str, Cell]:
    """Every arm `repeats` times in turn; one uncounted run of each before, on fewer tokens."""
    arms = [arm for arm in arms_of(session) if arm.name in names]
    cells = {arm.name: Cell() for arm in arms}
    for arm in arms:
        run(session, arm, [replace(r, max_tokens=8) for r in requests])
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else list(reversed(arms)):
            cells[arm.name].runs.append(run(session, arm, requests))
    return cells


def rows_of(form: str, n_seq: int, cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """One row per arm: medians, paired ratios, and whether the texts are those of plain decoding."""
    fixed = [name for name in cells if name not in (PLAIN, AUTO)]
    best = max((PLAIN, *fixed), key=lambda name: median(r.tok_s for r in cells[name].runs))
    rows = []
    for name, cell in cells.items():
        speeds = [r.tok_s for r in cell.runs]
        stats = [r.stats for r in cell.runs]
        different, margins = _differences(cells[PLAIN], cell)
        to_best = [
            a.tok_s / max(cells[other].runs[i].tok_s for other in (PLAIN, *fixed)) for i, a in enumerate(cell.runs)
        ]
        rows.append(
            {
                "format": form,
                "parallel": n_seq,
                "arm": name,
                "tok_s": median(speeds),
                "tok_s_min": min(speeds),
                "tok_s_max": max(speeds),
                "decode_tok_s": median(s.decode_tok_s for s in stats),
                "ratio_to_plain": median(cell.ratios(cells[PLAIN])),
                "ratio_to_plain_decoding": median(cell.ratios(cells[PLAIN], decoding=True)),
                "best": best,
                "ratio_to_best": median(cell.ratios(cells[best])),
                "ratio_to_best_of_each_repeat": median(to_best),
                "ratios_to_best": [round(x, 4) for x in cell.ratios(cells[best])],
                "accepted_length": median(s.accepted_length for s in stats),
                "verified_per_round": median(s.verified / s.rounds for s in stats),
                "own_ms": median(s.own_ms / s.tokens for s in stats),
                "parked_share": median(s.parked_share for s in stats),
                "different": different,
                "margins_at_first_difference": margins,
            }
        )
    return rows


def _differences(plain: Cell, cell: Cell) -> tuple[int, list[float]]:
    """(answers that differ from plain decoding in any repeat, plain's logit margin where each first did)."""
    margins = []
    for base, mine in zip(plain.runs, cell.runs, strict=True):
        for request, expected in base.answers.items():
            at = first_difference(mine.answers[request], expected)
            if at is not None:
                margins.append(round(base.margins[request][at], 4))
    return len(margins), margins


def show(row: dict[str, Any]) -> str:
    ratios = row["ratios_to_best"]
    return (
        f"{row['format']:6} {row['parallel']:3} {row['arm']:8} {row['tok_s']:7.1f} ({row['tok_s_min']:.1f}-"
        f"{row['tok_s_max']:.1f}) {row['decode_tok_s']:8.1f} {row['ratio_to_plain']:6.2f} "
        f"{row['ratio_to_best']:6.2f} ({min(ratios):.2f}-{max(ratios):.2f} of {row['best']}) tau {row['accepted_length']:.2f} "
        f"verified {row['verified_per_round']:.2f} parked {row['parked_share']:.0%} "
        f"different {row['different']} {row['margins_at_first_difference'] or ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--formats", default="F16,Q8_0", help="requantize the target to these (default F16,Q8_0)")
    parser.add_argument("--parallel", default="1,2,4,8,16", help="sequences at once (default 1,2,4,8,16)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=16,
        help=f"prompts at least, of {', '.join(MIX)} in turn (default 16); {FILLED} a sequence where that is more",
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens per answer on average (default 48)")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs per arm (default 3)")
    parser.add_argument("--arms", default=",".join(FIXED), help=f"beside plain and auto (default {','.join(FIXED)})")
    parser.add_argument("--drafter", default="lookup", help="lookup, auto or a drafter's path (default lookup)")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    options = parser.parse_args()
    counts = [int(n) for n in options.parallel.split(",")]
    names = (PLAIN, AUTO, *filter(None, options.arms.split(",")))
    found, rows = resolve(options.model), []
    print("format   R arm        tok/s (min-max)  decoding  plain   best (min-max)", flush=True)
    for form in options.formats.split(","):
        path = requantize(found.path, form, Path(gettempdir()) / "dspark-formats")
        opened = OpenOptions(
            path, found.name, drafter=options.drafter, drafter_path=found.drafter_path, n_seq=max(counts), ctx=1024
        )
        with Session.open(opened) as session:
            for n_seq in counts:
                requests = requests_of(session, max(options.prompts, FILLED * n_seq), options.tokens)
                with at_most(session, n_seq):
                    mine = rows_of(form, n_seq, measure(session, names, requests, options.repeats))
                rows += mine
                print("\n".join(map(show, mine)), flush=True)
    if options.json:
        report = {"schema": "dspark-parallel/1", "processor": processor(), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
