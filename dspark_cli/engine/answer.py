"""What one answer brought: its text, its tokens and its figures, read from rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_cli.engine.rounds import Round
from dspark_cli.engine.stats import Stats


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
