"""What each sequence's cache holds, and where a new prompt is best continued: what two prompts share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_cli.backends.base import Drafter, Target
from dspark_cli.backends.standalone import common_prefix
from dspark_cli.engine.running import Running

WORTH = 8  # tokens that copying a sequence, or waiting for another prompt, must save


@dataclass
class Slots:
    """The caches of target and drafter, which always hold the same tokens.

    tokens: sequence -> what its cache holds
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)

    def place(
        self, target: Target, drafter: Drafter | None, new: Running, free: Sequence[int], running: Sequence[Running]
    ) -> None:
        """Choose one of the `free` sequences for `new`, and keep, copy or await the beginning of its prompt."""
        prompt = new.prompt
        known = {seq: shared(held, prompt) for seq, held in self.tokens.items()}
        new.seq = max(free, key=lambda seq: known.get(seq, 0))
        cached = known.get(new.seq, 0)
        source = max(known, key=lambda seq: known[seq], default=new.seq)
        filling = [r for r in running if not r.decoding]
        promised = max(filling, key=lambda r: shared(r.prompt, prompt), default=None)
        if promised is not None:
            size = shared(promised.prompt, prompt)
            if size >= max(cached, known.get(source, 0)) + WORTH:
                # The least useful sequence: nothing in it is kept.
                new.seq = min(free, key=lambda seq: known.get(seq, 0))
                new.leader, new.shared = promised, size
                return
        if known.get(source, 0) >= cached + WORTH:
            new.seq = min(free, key=lambda seq: known.get(seq, 0))
            self.fork(target, drafter, source, new, known[source])
            return
        for keeper in (target, drafter):
            if keeper is not None:
                keeper.rewind(new.seq, cached)
        self.tokens[new.seq] = prompt[:cached]
        new.filled = new.cached = cached

    def fork(self, target: Target, drafter: Drafter | None, source: int, new: Running, length: int) -> None:
        """Give `new` the first `length` tokens of `source`."""
        for keeper in (target, drafter):
            if keeper is not None:
                keeper.fork(source, new.seq, length)
        self.tokens[new.seq] = new.prompt[:length]
        new.filled = new.cached = length

    def join(self, target: Target, drafter: Drafter | None, running: Sequence[Running]) -> None:
        """Let those go on who waited for a prompt that is now computed far enough."""
        for waiting in running:
            leader = waiting.leader
            if leader is not None and leader.filled >= waiting.shared:
                self.fork(target, drafter, leader.seq, waiting, waiting.shared)
                waiting.leader = None


def shared(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens of `prompt` that `held` begins with; its last token is always computed, for the logits."""
    if held[:WORTH] != prompt[:WORTH] and held[:1] != prompt[:1]:
        return 0
    return min(common_prefix(held, prompt), len(prompt) - 1)
