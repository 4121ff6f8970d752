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

    plain_tok_s: plain decoding by the cost model at this depth; None without a measured profile
    runner:      figures of plain decoding in a race that goes on
    """

    opened: Opened | None = None
    live: Live | None = None
    race: Race | None = None
    runner: Stats | None = None
    plain_tok_s: float | None = None

    def answer_begins(self) -> None:
        self.live, self.race, self.runner = Live(), None, None

    def add(self, rounds: list[Round]) -> None:
        """Rounds of the current answer; also reads what the cost model says of plain decoding now."""
        if self.live is None:
            self.live = Live()
        for item in rounds:
            self.live.add(item)
        self.read_costs()

    def read_costs(self) -> None:
        """The rate of plain decoding, where a profile of this machine stands behind it."""
        session = self.opened.session if self.opened else None
        if session is None or session.profile is None:
            self.plain_tok_s = None
            return
        self.plain_tok_s = session.costs.plain_tok_s(self.live.context_used if self.live else session.costs.depth)

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
