"""What `dspark batch` costs an item beside the native passes, and whether memory stays flat: many tiny items, real model.

    python tests/measure_overhead.py --items 10000

Prints wall and native time per item, and the process's resident memory after a fifth of the items and at the end.
Not part of the test suite (minutes); tests/batch checks memory on a table target.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "batch"))

import psutil
from killed import job

from dspark_cli.batch.progress import Figures
from dspark_cli.batch.runner import run_job
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.registry import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--parallel", type=int, default=16)
    options = parser.parse_args()
    found, process = resolve("smollm2-135m"), psutil.Process()
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        items = Path(folder) / "in.jsonl"
        items.write_text("".join(f'{{"prompt": "Item {i} of", "max_tokens": 1}}\n' for i in range(options.items)))
        mine = job([items], Path(folder) / "out.jsonl")
        opened = OpenOptions(found.path, found.name, drafter="none", n_seq=options.parallel, ctx=256)
        with Session.open(opened) as session:
            figures = Figures(len(mine.known))

            def tick() -> None:
                if figures.done in (options.items // 5, options.items):
                    memory[figures.done] = process.memory_info().rss / 1e6

            began, native = time.perf_counter(), session.target.native_ms
            run_job(mine, lambda: session, figures, tick=tick)
            wall = (time.perf_counter() - began) * 1e3
            native = session.target.native_ms - native
        written = (Path(folder) / "out.jsonl").read_bytes().count(b"\n")
    n = options.items
    print(f"{written} of {n} items written; {wall / n:.2f} ms an item, {native / n:.2f} in native passes, ", end="")
    print(
        f"{(wall - native) / n:.2f} outside; memory {', '.join(f'{mb:.0f} MB after {k}' for k, mb in memory.items())}"
    )


if __name__ == "__main__":
    main()
