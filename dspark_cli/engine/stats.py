"""The one place where rounds become figures. Everything shown anywhere is read from a `Stats`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from dspark_cli.engine.rounds import Round


def ids_sha256(tokens: Iterable[int]) -> str:
    """Hash of an answer's token ids: equal hashes mean the same answer, whatever the vocabulary's text is."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()


@dataclass
class Stats:
    """Figures of one answer, or of many (`add` rounds of several requests to one `Stats`).

    Prefill is kept apart: `rounds`, tau and tok/s speak of draft-verify cycles only. The first token of an answer comes
    from prefill, so `tokens` counts it and `decode_tok_s` does not.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    rounds: int = 0
    committed: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    parked: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    inject_ms: float = 0.0
    own_ms: float = 0.0
    prefill_ms: float = 0.0
    cut: int = 0  # rounds ended by a stop token inside the draft: no bonus token
    verified_at: list[int] = field(default_factory=list)  # rounds that verified position i
    reached_at: list[int] = field(default_factory=list)  # ... and accepted everything before it
    accepted_at: list[int] = field(default_factory=list)  # ... and accepted it too

    @classmethod
    def of(cls, rounds: Iterable[Round]) -> Self:
        """Figures of `rounds`."""
        stats = cls()
        for item in rounds:
            stats.add(item)
        return stats

    def add(self, item: Round) -> None:
        """Count one round."""
        self.tokens += len(item.tokens)
        share = 1.0 / item.shared  # a shared pass is paid once, whoever takes part
        if item.is_prefill:
            self.prompt_tokens += (item.prefill_tokens or 0) + item.cached
            self.prefill_tokens += item.prefill_tokens or 0
            self.prefill_ms += item.times.total * share
            return
        self.rounds += 1
        self.committed += len(item.tokens)
        self.drafted += item.drafted
        self.verified += item.verified
        self.accepted += item.accepted
        self.parked += item.parked is not None
        self.cut += len(item.tokens) < item.accepted + 1
        self.draft_ms += item.times.draft * share
        self.verify_ms += item.times.verify * share
        self.inject_ms += item.times.inject * share
        self.own_ms += item.times.own * share
        self._count_positions(item.verified, item.accepted)

    def _count_positions(self, verified: int, accepted: int) -> None:
        for counts in (self.verified_at, self.reached_at, self.accepted_at):
            counts.extend([0] * (verified - len(counts)))
        for position in range(verified):
            self.verified_at[position] += 1
            self.reached_at[position] += position <= accepted
            self.accepted_at[position] += position < accepted

    @property
    def decode_s(self) -> float:
        return (self.draft_ms + self.verify_ms + self.inject_ms + self.own_ms) / 1e3

    @property
    def decode_tok_s(self) -> float:
        return self.committed / self.decode_s if self.decode_s else 0.0

    @property
    def prefill_tok_s(self) -> float:
        return self.prefill_tokens / (self.prefill_ms / 1e3) if self.prefill_ms else 0.0

    @property
    def accepted_length(self) -> float:
        """tau: tokens committed per round, the bonus token included."""
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Drafted tokens accepted / drafted tokens verified."""
        return self.accepted / self.verified if self.verified else 0.0

    @property
    def survival(self) -> list[float]:
        """survival@i: of the rounds that verified position i, the share in which it was accepted."""
        return [a / v for a, v in zip(self.accepted_at, self.verified_at, strict=True)]

    @property
    def conditional(self) -> list[float]:
        """conditional@i: of the rounds that verified position i and accepted all before it, the share that accepted it."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_at, self.reached_at, strict=True)]

    @property
    def own_ms_per_round(self) -> float:
        return self.own_ms / self.rounds if self.rounds else 0.0

    @property
    def parked_share(self) -> float:
        return self.parked / self.rounds if self.rounds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The keys of DESIGN section 7 that are figures."""
        return {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "verified": self.verified,
            "accepted": self.accepted,
            "accepted_length": round(self.accepted_length, 4),
            "acceptance_rate": round(self.acceptance_rate, 4),
            "survival": [round(x, 4) for x in self.survival],
            "conditional": [round(x, 4) for x in self.conditional],
            "decode_s": round(self.decode_s, 4),
            "decode_tok_s": round(self.decode_tok_s, 2),
            "prefill_s": round(self.prefill_ms / 1e3, 4),
            "prefill_tok_s": round(self.prefill_tok_s, 2),
            "time_ms": {
                "draft": round(self.draft_ms, 2),
                "verify": round(self.verify_ms, 2),
                "inject": round(self.inject_ms, 2),
                "own": round(self.own_ms, 2),
            },
            "parked_share": round(self.parked_share, 4),
        }
