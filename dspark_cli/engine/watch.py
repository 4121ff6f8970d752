"""A reader of rounds that notices a drafter which does nothing: it loads, costs memory, and never helps."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_cli.engine.rounds import Round

#: rounds after which a drafter should have shown something
FIRST_ROUNDS = 50
#: verified tokens without one accepted that are no bad luck: at 20 % acceptance the chance is below 1 in 80
ENOUGH_VERIFIED = 20


@dataclass
class Watch:
    """Counts the first rounds of a session; `warning` is asked after each round and speaks once.

    kind: of the model drafter ("dspark", "small", ...); lookup may rightly find nothing, so it is not watched
    """

    kind: str | None
    rounds: int = 0
    proposed: int = 0
    verified: int = 0
    accepted: int = 0
    _done: bool = field(default=False, repr=False)

    def add(self, item: Round) -> str | None:
        """Take in a round; the warning when it is time for one, else None."""
        if self._done or self.kind in (None, "lookup") or item.is_prefill or item.parked:
            return None
        if item.source == "lookup":
            return None
        self.rounds += 1
        self.proposed += item.drafted
        self.verified += item.verified
        self.accepted += item.accepted
        if self.accepted:
            self._done = True
            return None
        if self.rounds < FIRST_ROUNDS or (self.proposed and self.verified < ENOUGH_VERIFIED):
            return None
        self._done = True
        return self._words()

    def _words(self) -> str:
        if not self.proposed:
            return (
                f"warning: the {self.kind} drafter proposed nothing in {self.rounds} rounds. Likely cause: the policy never "
                "asks it (too slow here, or --policy off), or its block is empty. `dspark doctor MODEL` shows the pair"
            )
        cause = {
            "small": "another tokenizer or another chat template than the target's",
            "eagle3": "it was trained for another version of this target",
        }.get(self.kind or "", "made for another target, a block that counts the anchor otherwise, or a damaged export")
        return (
            f"warning: of {self.verified} tokens that the {self.kind} drafter proposed in {self.rounds} rounds none was "
            f"accepted. Likely cause: {cause}. `dspark doctor MODEL` checks the pair; --drafter lookup does without it"
        )
