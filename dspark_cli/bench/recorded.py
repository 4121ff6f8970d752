"""Rounds recorded to calibrate a drafter: full blocks verified, so that every position shows what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_cli.backends.base import Drafter
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.bench.prompts import KINDS
from dspark_cli.engine.admission import admit
from dspark_cli.engine.beliefs import products
from dspark_cli.engine.calibration import GRID, Recorded, Sts, brier, ece, fit_sts, pooled, report
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.schedule import Fixed
from dspark_cli.engine.session import Session

PATTERNS = (0.98, 0.9, 0.8, 0.65, 0.5, 0.3, 0.1)  # the same confidence at every position
AT_LEAST = 150  # rounds that a position needs for a temperature of its own


@dataclass(frozen=True)
class Halves:
    """Rounds of one source, split by prompt: one half to fit on, one to judge by."""

    source: str
    fit: Recorded
    held_out: Recorded


def drafter_alone(session: Session) -> Drafter:
    """The model drafter of a session without the lookup beside it; the lookup where there is no model."""
    assert session.drafter is not None
    if isinstance(session.drafter, CombinedDrafter):
        return CombinedDrafter(session.drafter.model)
    return session.drafter


def record(
    session: Session,
    drafter: Drafter,
    *,
    rounds: int,
    tokens: int,
    temperatures: Sequence[float],
    progress: Callable[[int, int], None] = lambda done, wanted: None,
) -> Halves:
    """Answer prompts of all kinds until `rounds` rounds with a draft are there, in both halves, or the prompts are used up."""
    halves: tuple[list[tuple[tuple[float, ...], int, int]], ...] = ([], [])
    source = drafter.kind
    engine = Engine(session.target, drafter, Fixed(drafter.pass_block))
    # Kinds in turn: whatever stops it early, all kinds are in there.
    prompts = [p for group in zip(*KINDS.values(), strict=True) for p in group]
    for number, prompt in enumerate(prompts):
        for temperature in temperatures:
            for item in engine.run([prompt.request(session, tokens, SamplingOptions(temperature=temperature))]):
                if item.drafted and item.confidence is not None:
                    # By prompt and not by round: neighbours are alike. Both halves get every kind.
                    half = (number // len(KINDS) + number) % 2
                    halves[half].append((item.confidence, item.verified, item.accepted))
        done = sum(map(len, halves))
        progress(min(done, rounds), rounds)
        if done >= rounds and all(halves):  # a long answer may be enough, but leaves nothing to judge by
            break
    return Halves(source, Recorded.of(halves[0]), Recorded.of(halves[1]))


def calibrate(halves: Halves) -> tuple[Sts, dict[str, Any]]:
    """STS fitted on one half, and what it does to the other; kept only if that half is better for it.

    Better by ECE, which STS minimises, and by Brier score, with temperatures inside the grid: at its edge every confidence
    becomes a half, because the error is not one of scale. That lowers ECE and leaves a schedule nothing to choose by; the
    online recalibration, which also shifts, mends it better.
    """
    sts = fit_sts(halves.fit, at_least=AT_LEAST)
    before = after = (0.0, 0.0)
    if len(halves.held_out):
        before, after = ((ece(*pair), brier(*pair)) for pair in (pooled(halves.held_out, s) for s in (Sts(), sts)))
    inside = all(GRID[0] < t < GRID[-1] for t in sts.temperatures)
    helps = inside and after[0] < before[0] and after[1] <= before[1]
    return sts if helps else Sts(), {
        "source": halves.source,
        "rounds_fit": len(halves.fit),
        "rounds_held_out": len(halves.held_out),
        "temperatures": [round(t, 4) for t in sts.temperatures],
        "ece_before": round(before[0], 4),
        "ece_after": round(after[0], 4),
        "brier_before": round(before[1], 4),
        "brier_after": round(after[1], 4),
        "used": helps,
        "positions": [
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            for row in (report(halves.held_out, sts) if len(halves.held_out) else [])
        ],
    }


def schedule_for(costs: CostModel, confidence: float, block: int, *, depth: int = 256) -> dict[str, Any]:
    """What `auto` does if every round looks like this: tokens verified, and the speed over plain decoding."""
    return _planned(costs, products([confidence] * block), block, depth) | {"confidence": confidence}


def expected_speed(costs: CostModel, survival: Sequence[float], block: int, *, depth: int = 256) -> dict[str, Any]:
    """The same for mean survivals by position."""
    return _planned(costs, survival, block, depth)


def _planned(costs: CostModel, survival: Sequence[float], block: int, depth: int) -> dict[str, Any]:
    plain = costs.plain_ms(1, depth)
    beside = costs.own_ms + costs.pass_ms(1, block, depth)
    ms = [verify + beside for verify in costs.verify_ms(1, depth, 1 + len(survival), start=1)]
    length = admit([survival], ms, early_stop=False)[0]
    rate = (1.0 + sum(survival[:length])) / ms[length] * plain
    # Below 1 the drafter is parked: plain decoding, now and then a probe.
    return {"verify": length if rate > 1.0 else 0, "speed": round(max(1.0, rate), 4)}
