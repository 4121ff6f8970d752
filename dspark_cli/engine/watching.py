"""Drafts nobody verified, compared with what their requests say without them: what a drafter is worth, nearly for free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_cli.backends.base import Draft
from dspark_cli.engine.running import Running
from dspark_cli.engine.schedule import Outcome


@dataclass
class Watched:
    """A deterministic draft for `request`. kept: tokens that came as drafted;  open: whether the next is still to come."""

    request: Running
    draft: Draft
    kept: int = 0
    judged: int = 0
    open: bool = True

    def read(self, tokens: Sequence[int]) -> None:
        """`tokens` were committed after those read before."""
        for token in tokens:
            if not self.open:
                return
            right = token == int(self.draft.tokens[self.judged])
            self.judged += 1
            self.kept += right
            self.open = right and self.judged < len(self.draft)
        if self.request.finish:
            self.open = False

    @property
    def outcome(self) -> Outcome:
        """What is known so far. An answer that ended early leaves positions unjudged."""
        return Outcome(self.draft, 0, 0, self.judged, self.kept)
