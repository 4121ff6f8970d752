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
    """Counts the rounds of a session until a draft token is accepted; `add` answers with a warning when it is time for one.

    kind: of the model drafter ("dspark", "small", ...); lookup may rightly find nothing, so it is not watched
    """

    kind: str | None
    rounds: int = 0
    proposed: int = 0
    verified: int = 0
    parked: str | None = None
    _said: int = field(default=0, repr=False)  # 1: that too little was tried to be sure, 2: everything there is to say

    def add(self, item: Round) -> str | None:
        """Take in a round; the warning when it is time for one, else None."""
        if self._said > 1 or self.kind in (None, "lookup") or item.is_prefill or item.source == "lookup":
            return None
        self.rounds += 1
        self.proposed += item.drafted
        self.verified += item.verified
        self.parked = item.parked or self.parked
        sure = self.verified >= ENOUGH_VERIFIED or not self.proposed
        if item.accepted:
            self._said = 2
            return None
        if self.rounds < FIRST_ROUNDS or self._said >= 1 + sure:
            return None
        self._said = 1 + sure
        return self._words(sure)

    def _words(self, sure: bool) -> str:
        parked = f"speculation is parked ({self.parked})" if self.parked else ""
        nothing = f"the {self.kind} drafter proposed nothing in {self.rounds} rounds"
        if not self.proposed and parked:  # as the policy wants it: nothing is wrong with the pair
            return f"note: {nothing}: {parked}. --drafter lookup saves its memory"
        if not self.proposed:
            return (
                f"warning: {nothing}. Likely cause: its block is empty, or the policy never asks it. "
                "`dspark doctor MODEL` shows the pair; --drafter lookup saves its memory"
            )
        cause = {
            "small": "another tokenizer or another chat template than the target's",
            "eagle3": "it was trained for another version of this target",
        }.get(self.kind or "", "made for another target, a block that counts the anchor otherwise, or a damaged export")
        few = "" if sure else f"; {parked or 'the policy tries few'}, so that may be bad luck"
        return (
            f"warning: of {self.verified} tokens of the {self.kind} drafter that were verified in {self.rounds} rounds none "
            f"was accepted{few}. Likely cause{'' if sure else ' if it stays so'}: {cause}. "
            "`dspark doctor MODEL` checks the pair; --drafter lookup does without it"
        )
