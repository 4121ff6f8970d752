"""What a drafter is worth: real speculative decoding of prompts it has never seen, every drafted token verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dspark_cli.backends.base import Drafter, Target
from dspark_cli.bench.recorded import Halves, calibrate
from dspark_cli.engine.calibration import Recorded
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.schedule import Fixed
from dspark_cli.engine.stats import Stats

TEMPERATURES = (0.0, 1.0)


def evaluate(
    target: Target,
    drafter: Drafter,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    tokens: int = 128,
    temperatures: Sequence[float] = TEMPERATURES,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Figures by group of prompts (token ids) and temperature, and the calibration that follows from the greedy rounds.

    tau names its rule: exact match, greedy and at each temperature.
    """
    rows: list[dict[str, Any]] = []
    recorded: tuple[list[Any], list[Any]] = ([], [])
    for temperature in temperatures:
        everything = Stats()
        for group, texts in prompts.items():
            stats = Stats()
            for number, ids in enumerate(texts):
                for item in decode(target, drafter, ids, tokens, temperature):
                    stats.add(item)
                    everything.add(item)
                    if item.drafted and item.confidence is not None and temperature == temperatures[0]:
                        recorded[number % 2].append((item.confidence, item.verified, item.accepted))
                progress()
            rows.append(_row(group, temperature, stats))
        if len(prompts) > 1:
            rows.append(_row("all", temperature, everything))
    halves = Halves(drafter.kind, Recorded.of(recorded[0]), Recorded.of(recorded[1]))
    sts, found = calibrate(halves)
    first = next(r for r in reversed(rows) if r["temperature"] == temperatures[0])
    return {
        "target_format": target.info.format,
        "rows": rows,
        "temperatures": [round(t, 4) for t in sts.temperatures],
        "survival": first["survival"],
        "rounds": first["rounds"],
        "ece_before": found["ece_before"],
        "ece_after": found["ece_after"],
        "sts_used": found["used"],
    }


def decode(target: Target, drafter: Drafter, ids: Sequence[int], tokens: int, temperature: float) -> list[Round]:
    """One answer with whole blocks verified; rounds that the token limit cut short are left out."""
    ends = target.tokenizer.eog_ids
    engine = Engine(target, drafter, Fixed(drafter.block_size))
    request = Request(ids, tokens, SamplingOptions(temperature=temperature, seed=len(ids)), ends)
    rounds = list(engine.run([request]))
    return [item for item in rounds if item.is_prefill or item.verified == drafter.block_size]


def _row(group: str, temperature: float, stats: Stats) -> dict[str, Any]:
    return {
        "prompts": group,
        "temperature": temperature,
        "accepted_length": round(stats.accepted_length, 3),
        "survival": [round(s, 4) for s in stats.survival],
        "conditional": [round(s, 4) for s in stats.conditional],
        "rounds": stats.rounds,
        "tokens": stats.committed,
    }
