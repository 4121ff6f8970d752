"""How much to draft and how much of it to verify.

A schedule decides on position k from confidences up to k and from history, never from tokens k and later: that keeps
sampled drafts lossless (DESIGN section 2, the paper's appendix A).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_cli.backends.base import BadInput, Draft
from dspark_cli.engine.rounds import Times

ALLOWED = "auto, off, fixed:N (N = tokens verified per round), threshold:P (P = lowest confidence, 0 to 1)"


@dataclass(frozen=True)
class Outcome:
    """What became of one sequence's draft in a round, for schedules that learn.

    verified: tokens the target checked;  accepted: how many of them it kept
    judged:   positions whose fate is known: the verified ones, and for a deterministic draft also the next one, since
              the bonus token says whether it would have been kept;  kept: how many of the judged ones were right
    """

    draft: Draft
    verified: int
    accepted: int
    judged: int
    kept: int


class Schedule(ABC):
    """A policy over R >= 1 sequences that share one verify pass.

    `begin` for each request. Per round: `limit` and `block`, then `passes` where the drafter has a pass, `choose` and `watched`
    once the drafts are there, `observe` at the end; `seen` when watched drafts have been judged.
    """

    name: str

    def limit(self, room: int, requests: int) -> int:
        """Tokens that one sequence may draft, where the pass has `room` for draft tokens of all `requests`. Before `block`.

        An equal share, unless `choose` keeps to `room` itself.
        """
        return max(0, room // requests)

    def begin(self, requests: int) -> None:  # noqa: B027
        """A request begins to decode, one of `requests` that do."""

    @abstractmethod
    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        """Tokens to draft per sequence, at most `limits` (what context, budget and drafter allow). 0 skips the drafter.

        depth: mean number of tokens in the sequences' caches.
        """

    def passes(self, blocks: Sequence[int], quick: Sequence[Draft]) -> list[int]:
        """Tokens to draft by the drafter's own pass, instead of taking the `quick` draft; 0 = take that."""
        return [0 if likely(draft, block) else block for block, draft in zip(blocks, quick, strict=True)]

    @abstractmethod
    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        """Tokens to verify of each draft."""

    def observe(self, outcomes: Sequence[Outcome], times: Times) -> None:  # noqa: B027  (fixed policies do not learn)
        """What the round brought and what it cost (the shared passes of all sequences), after it ended."""

    def watched(self) -> Sequence[int]:
        """Which of the drafts just chosen from are to be compared with what their requests say in the next rounds: none of
        their tokens is verified, all are deterministic, and `seen` is told what became of them. After `choose`."""
        return ()

    def seen(self, outcomes: Sequence[Outcome]) -> None:  # noqa: B027
        """What became of the drafts that were `watched`, in their order, once all of it is known."""

    @property
    def parked(self) -> str | None:
        """Why speculation is switched off for now; None while it is on."""
        return None


def likely(draft: Draft, block: int) -> bool:
    """Whether the whole of a draft is more likely right than not."""
    return len(draft) > 0 and draft.confidence is not None and float(np.prod(draft.confidence[:block])) >= 0.5


class Off(Schedule):
    """Plain decoding."""

    name = "off"

    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        return [0 for _ in limits]

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        return [0 for _ in drafts]


@dataclass(frozen=True)
class Fixed(Schedule):
    """Draft and verify `length` tokens every round."""

    length: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"fixed:{self.length}"

    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        return [min(limit, self.length) for limit in limits]

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        return [len(draft) for draft in drafts]


@dataclass(frozen=True)
class Threshold(Schedule):
    """Verify up to the first token whose own confidence is below `lowest` (llama.cpp's `p_min`; no products, no costs)."""

    lowest: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"threshold:{self.lowest:g}"

    def block(self, limits: Sequence[int], depth: float) -> list[int]:
        return list(limits)

    def choose(self, drafts: Sequence[Draft]) -> list[int]:
        return [self._length(draft) for draft in drafts]

    def _length(self, draft: Draft) -> int:
        if draft.confidence is None:
            return len(draft)
        return next((i for i, c in enumerate(draft.confidence) if c < self.lowest), len(draft))


def parse_policy(text: str) -> Schedule:
    """A schedule from `auto`, `off`, `fixed:N` or `threshold:P`. Raises BadInput that says what is allowed."""
    name, _, value = text.partition(":")
    try:
        if name == "auto" and not value:
            from dspark_cli.engine.auto import AutoSchedule  # which builds on this file

            return AutoSchedule()
        if name == "off" and not value:
            return Off()
        if name == "fixed" and int(value) >= 1:
            return Fixed(int(value))
        if name == "threshold" and 0.0 <= float(value) <= 1.0:
            return Threshold(float(value))
    except ValueError:
        pass
    raise BadInput(f"unknown policy {text!r}: one of {ALLOWED}")
