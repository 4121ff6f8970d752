"""The installed command on the embedded model: few runs, what only a real model shows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_cli.batch.runner import BATCH_NEAR_TIE
from dspark_cli.bench.formats import requantize
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.session import OpenOptions, Session, first_difference
from measure_kills import compare, kill_often, results, write_items
from prompts import PROMPTS

pytestmark = pytest.mark.slow

DSPARK = [sys.executable, "-m", "dspark_cli", "batch"]


def dspark(*args: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*DSPARK, *map(str, args)], capture_output=True, timeout=300, check=False)


def test_a_batch_from_the_outside(tmp_path: Path, embedded_gguf: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("id,city\n" + "".join(f"c{i},{city}\n" for i, city in enumerate(("Rome", "Oslo", "Lima"))))
    template = "Name one famous building in {{ city }}."
    done = dspark(source, "-o", out, "--template", template, "--max-tokens", 12, "--system", "Be brief.", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["items"], summary["done"], summary["failed"]) == (3, 3, 0)
    assert summary["cached_tokens"] > 20  # the system prompt was computed once
    assert [r["id"] for r in results(out)] == ["c0", "c1", "c2"]
    assert all(r["text"] and r["tokens"] <= 12 for r in results(out))
    again = dspark(source, "-o", out, "--template", template, "--max-tokens", 12)
    assert (again.returncode, again.stdout) == (2, b"")
    assert b"out.jsonl is there already" in again.stderr


def test_texts_are_those_of_one_at_a_time(embedded_gguf: Path, tmp_path: Path) -> None:
    """Greedy, F16: equal up to near-ties. Lookup drafts for four sequences at once, prompts come in beside them."""
    path = requantize(embedded_gguf, "F16", tmp_path)
    with Session.open(OpenOptions(path, "smollm2-135m", drafter="lookup", policy="fixed:3", n_seq=4, ctx=512)) as s:
        chosen = [*PROMPTS[:4], *PROMPTS[-4:]]
        made = [
            s.chat_request([{"role": "user", "content": p}], max_tokens=24, sampling=SamplingOptions()) for p in chosen
        ]
        alone, margins = [], []
        for request in made:
            rounds = list(s.run(request, plain=True, margins=True))
            alone.append([t for r in rounds for t in r.tokens])
            margins.append([m for r in rounds for m in r.margins or ()])
        batch: dict[int, list[int]] = {}
        rounds = list(s.run_all([replace(request, id=i) for i, request in enumerate(made)]))
        for item in rounds:
            batch.setdefault(item.request, []).extend(item.tokens)
    assert sum(r.accepted for r in rounds) > 3, "nothing was drafted: the test says nothing"
    assert max(r.shared for r in rounds) == 4
    found = {i: first_difference(batch[i], expected) for i, expected in enumerate(alone)}
    ties = {i: margins[i][at] for i, at in found.items() if at is not None}
    assert all(margin < BATCH_NEAR_TIE["F16"] for margin in ties.values()), ties
    assert len(ties) <= 2, ties


def test_a_long_system_prompt_is_computed_once(embedded_gguf: Path) -> None:
    with Session.open(OpenOptions(embedded_gguf, "smollm2-135m", n_seq=4, ctx=2048, policy="off")) as session:
        table = " ".join(f"Train {i} leaves at {i % 24}:{i % 60:02}." for i in range(60))
        system = f"You are a clerk who knows the timetable. {table}"
        made = [
            session.chat_request(
                [{"role": "system", "content": system}, {"role": "user", "content": f"When does train {i} leave?"}],
                max_tokens=4,
                sampling=SamplingOptions(),
            )
            for i in range(4)
        ]
        sizes = [len(r.prompt) for r in made]
        rounds = list(session.run_all(made))
    assert min(sizes) > 700
    computed = sum(r.prefill_tokens or 0 for r in rounds)
    assert computed + sum(r.cached for r in rounds) == sum(sizes)
    assert computed < max(sizes) + 4 * 25


def test_kills_of_the_real_thing(tmp_path: Path, embedded_gguf: Path) -> None:
    items, out, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    write_items(items, 16)
    assert kill_often(items, whole, 0) == 0
    assert kill_often(items, out, 4, 1) >= 3
    mine, theirs = results(out), results(whole)
    assert [r["id"] for r in mine] == [r["id"] for r in theirs] == list(range(16))
    _, wrong = compare(mine, theirs)
    assert not wrong


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, embedded_gguf: Path) -> None:
    items, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_items(items, 60)
    command = subprocess.Popen([*DSPARK, str(items), "-o", str(out), "--parallel", "2"], stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while command.poll() is None and time.monotonic() < end and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130
    finished: list[dict[str, Any]] = results(out)
    assert 3 <= len(finished) < 60
    assert f"interrupted: {len(finished)} of 60 items are in".encode() in said
    assert b"--resume goes on" in said
    assert b"Traceback" not in said
