"""Arms measured in turn on one loaded pair, so that drift of the machine hits all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from dspark_cli.backends.base import Drafter, Target
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, Round
from dspark_cli.engine.schedule import Schedule
from dspark_cli.engine.stats import Stats, ids_sha256

PLAIN = "plain"


@dataclass(frozen=True)
class Arm:
    """One way to decode: a drafter (None = plain) and a policy."""

    name: str
    drafter: Drafter | None
    schedule: Schedule


@dataclass
class Measured:
    """What one arm did with one request, run by run."""

    stats: list[Stats] = field(default_factory=list)
    tokens: tuple[int, ...] = ()

    @property
    def tok_s(self) -> float:
        """Median decode speed over the runs, tokens per second."""
        return median(s.decode_tok_s for s in self.stats)

    @property
    def sha256(self) -> str:
        return ids_sha256(self.tokens)


def measure(
    target: Target,
    arms: Sequence[Arm],
    requests: Sequence[Request],
    *,
    repeats: int,
    progress: Callable[[str, int], None] = lambda arm, request: None,
) -> Mapping[str, list[Measured]]:
    """Run every arm on every request `repeats` times, round-robin; arm name -> one `Measured` per request.

    The first pass over the arms is a warm-up and is not counted. Each run starts with an empty cache.
    """
    results = {arm.name: [Measured() for _ in requests] for arm in arms}
    for index, request in enumerate(requests):
        for repeat in range(repeats + 1):
            order = arms if repeat % 2 == 0 else list(reversed(arms))
            for arm in order:
                progress(arm.name, index)
                rounds = answer(target, arm, request)
                if repeat:
                    results[arm.name][index].stats.append(Stats.of(rounds))
                    results[arm.name][index].tokens = tuple(token for item in rounds for token in item.tokens)
    return results


def answer(target: Target, arm: Arm, request: Request, *, margins: bool = False) -> list[Round]:
    """One answer from empty caches. `margins`: see Engine."""
    target.drop(0)
    if arm.drafter is not None:
        arm.drafter.drop(0)
    else:
        target.request_features(())
    return list(Engine(target, arm.drafter, arm.schedule, margins=margins).run([request]))


def paired_ratios(results: Mapping[str, list[Measured]], arm: str, base: str = PLAIN) -> list[float]:
    """Speed of `arm` over `base`, run by run, for every request."""
    return [
        mine.decode_tok_s / theirs.decode_tok_s
        for a, b in zip(results[arm], results[base], strict=True)
        for mine, theirs in zip(a.stats, b.stats, strict=True)
    ]
