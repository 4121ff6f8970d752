"""One answer as it grows, read from rounds, and as the documented JSON object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dspark_cli.engine.rounds import Request, Round
from dspark_cli.engine.stats import Stats, ids_sha256

if TYPE_CHECKING:
    from dspark_cli.engine.session import Session


@dataclass
class Answer:
    """What one answer brought. Filled round by round, so an interrupted one keeps what it has."""

    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    sources: dict[str, int] = field(default_factory=dict)
    parked: str | None = None

    def add(self, item: Round) -> None:
        self.stats.add(item)
        self.tokens += item.tokens
        self.text += item.text
        self.finish = item.finish
        self.parked = item.parked
        if item.source:
            self.sources[item.source] = self.sources.get(item.source, 0) + item.accepted


def as_json(session: Session, request: Request, answer: Answer) -> dict[str, Any]:
    """One generation with the keys of the documented schema."""
    info = session.target.info
    return {
        "model": info.name,
        "drafter": session.drafter.name if session.drafter else None,
        "backend": info.backend,
        "format": info.format,
        "policy": session.policy,
        "temperature": request.sampling.temperature,
        "seed": request.sampling.seed,
        "text": answer.text,
        "ids_sha256": ids_sha256(answer.tokens),
        "finish_reason": answer.finish or "interrupted",
        **answer.stats.as_dict(),
    }
