"""Do answers depend on their neighbours? The same prompts decoded in another order, and with drafts, on a real model.

    python tests/measure_neighbours.py --format F16

Prints how many answers part from the first run's, and by how much two logits had to change where each does. Not part of the
test suite.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from dspark_cli.bench.formats import requantize
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off, Schedule
from dspark_cli.engine.session import OpenOptions, Session, first_difference
from dspark_cli.registry import resolve
from prompts import PROMPTS

Answers = dict[int, list[int]]


def run(session: Session, requests: list[Request], schedule: Schedule) -> tuple[Answers, dict[int, list[float]]]:
    tokens: Answers = {}
    margins: dict[int, list[float]] = {}
    assert session.drafter is not None
    for seq in range(session.target.info.n_seq):
        session.target.drop(seq)
        session.drafter.drop(seq)
    for item in Engine(session.target, session.drafter, schedule, margins=True).run(requests):
        tokens.setdefault(item.request, []).extend(item.tokens)
        margins.setdefault(item.request, []).extend(item.margins or ())
    return tokens, margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", help="requantize the target to this first (default: as it is)")
    parser.add_argument("--parallel", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    path = resolve("smollm2-135m").path
    if options.format:
        path = requantize(path, options.format, Path(gettempdir()) / "dspark-formats")
    opened = OpenOptions(path, path.name, drafter="lookup", policy="fixed:3", n_seq=options.parallel, ctx=512)
    with Session.open(opened) as session:
        for temperature in (0.0, 1.0):
            made = [
                replace(
                    session.chat_request(
                        [{"role": "user", "content": prompt}],
                        max_tokens=options.tokens,
                        sampling=SamplingOptions(temperature=temperature, seed=i),
                    ),
                    id=i,
                )
                for i, prompt in enumerate(PROMPTS[: options.prompts])
            ]
            base, margins = run(session, made, Off())
            for name, order, schedule in (("in reverse", made[::-1], Off()), ("with drafts", made, Fixed(3))):
                other, _ = run(session, order, schedule)
                at = {i: first_difference(other[i], expected) for i, expected in base.items()}
                parted = {i: n for i, n in at.items() if n is not None}
                near = [round(margins[i][n], 4) for i, n in parted.items() if n < len(margins[i])]
                print(f"temperature {temperature:g}, {name}: {len(parted)} of {len(made)} differ {near}", flush=True)


if __name__ == "__main__":
    main()
