"""What the panel and the summary show: figures of the engine's readers and facts of the loaded pair. No Textual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark_cli.engine.live import Live, Race
from dspark_cli.engine.rounds import Round
from dspark_cli.engine.stats import Stats
from dspark_cli.tui.opening import Opened

if TYPE_CHECKING:
    from dspark_cli.registry.plan import MemoryPlan


@dataclass
class Watching:
    """One answer, its race, and the pair that makes it.

    runner:      figures of plain decoding in a race that goes on
    """

    opened: Opened | None = None
    live: Live | None = None
    race: Race | None = None
    runner: Stats | None = None

    def answer_begins(self) -> None:
        self.live, self.race, self.runner = Live(), None, None

    def add(self, rounds: list[Round]) -> None:
        """Rounds of the current answer; plain decoding is taken to cost what the cost model says now."""
        if self.live is None:
            self.live = Live()
        session = self.opened.session if self.opened else None
        known = session is not None and session.profile is not None
        plain = session.costs.plain_ms(1, self.live.context_used) if session and known else None
        for item in rounds:
            self.live.add(item, plain)

    @property
    def plain_tok_s(self) -> float | None:
        """Plain decoding of this answer: raced, else by the costs measured on this machine; None where neither was done."""
        raced = self.race.plain if self.race else self.runner
        if raced is not None and raced.decode_tok_s:
            return raced.decode_tok_s
        return self.live.plain_tok_s if self.live else None

    @property
    def tok_s(self) -> float:
        return self.live.stats.decode_tok_s if self.live else 0.0

    @property
    def drafter(self) -> str | None:
        session = self.opened.session if self.opened else None
        return session.drafter.kind if session and session.drafter else None

    @property
    def policy(self) -> str:
        return self.opened.session.policy if self.opened else ""

    @property
    def n_ctx(self) -> int:
        return self.opened.session.target.info.n_ctx if self.opened else 0

    @property
    def plan(self) -> MemoryPlan | None:
        return self.opened.plan if self.opened else None
