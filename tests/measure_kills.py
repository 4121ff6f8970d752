"""Kill `dspark batch` on the embedded model again and again, resume it each time, and compare with a run nobody killed.

    python tests/measure_kills.py --kills 100 --items 200

Prints what was found; exits 1 if an item is lost, doubled or damaged, or a text differs anywhere but at a reported near-tie.
Not part of the test suite (minutes); tests/batch does it on a table target, and a few kills on the embedded model.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from prompts import PROMPTS

LOOKS = ("briefly", "in one sentence", "for a child", "in a formal tone", "with an example", "as a list", "in French")
REACH = 24  # characters of a token and of what a held-back stop text may shift


def write_items(path: Path, count: int) -> None:
    """`count` items whose answers end after different numbers of tokens."""
    random = Random(0)
    with path.open("w") as out:
        for i in range(count):
            prompt = f"{PROMPTS[i % len(PROMPTS)]} Answer {LOOKS[i // len(PROMPTS) % len(LOOKS)]}."
            out.write(json.dumps({"id": i, "prompt": prompt, "max_tokens": random.randint(6, 30)}) + "\n")


def start(items: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dspark_cli", "batch", str(items), "-o", str(out), "--resume", "--quiet"]
    return subprocess.Popen([*command, "--parallel", "4", "--ctx", "512", *more], stderr=subprocess.PIPE)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_often(items: Path, out: Path, kills: int, seed: int = 0, *more: str) -> int:
    """Runs killed before they ended; then one run to the end."""
    random, killed = Random(seed), 0
    for _ in range(kills):
        process = start(items, out, *more)
        wanted = lines_of(out) + random.randrange(3)
        while process.poll() is None and lines_of(out) < wanted:
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    last = start(items, out, *more)
    _, said = last.communicate()
    if last.returncode != 0:
        raise SystemExit(f"the last run ended with {last.returncode}: {said.decode()}")
    return killed


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(mine: list[dict[str, Any]], whole: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """(near-ties, differences that are none): where texts part, and the reported margin there."""
    ties, wrong = [], []
    for a, b in zip(mine, whole, strict=True):
        if a["text"] == b["text"]:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a["text"], b["text"], strict=False)) if x != y), None)
        at = min(len(a["text"]), len(b["text"])) if at is None else at
        near = [m for r in (a, b) for c, m in r["near_ties"] if c <= at <= c + REACH]
        (ties if near else wrong).append((a["id"], at, min(near, default=None)))
    return ties, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--items", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        items, out, whole = (Path(folder) / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
        write_items(items, options.items)
        began = time.perf_counter()
        kill_often(items, whole, 0)
        alone = time.perf_counter() - began
        killed = kill_often(items, out, options.kills)
        mine, theirs = results(out), results(whole)
        order = [r["id"] for r in mine] == list(range(options.items)) == [r["id"] for r in theirs]
        ties, wrong = compare(mine, theirs)
    print(f"{killed} runs killed, one of {alone:.0f} s alone; {len(mine)} items, each once and in order: {order}")
    print(
        f"{len(mine) - len(ties) - len(wrong)} texts identical; near-ties (id, character, margin): {ties}; others: {wrong}"
    )
    raise SystemExit(0 if order and not wrong and killed else 1)


if __name__ == "__main__":
    main()
