"""What goes into the decode loop (`Request`) and what comes out of it (`Round`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dspark_cli.backends.errors import DsparkError

FinishReason = Literal["stop", "length", "context", "error"]


@dataclass(frozen=True)
class SamplingOptions:
    """How the target's logits become one token. `temperature` 0 is greedy; the other fields then change nothing but penalties.

    top_k 0, top_p 1 and min_p 0 are off. Order: repetition penalty, temperature, top-k, top-p, min-p.
    accept: "exact" draws the target's token at each position and keeps the draft while it is the same (with a seed the
            text equals plain decoding with that seed); "residual" is the paper's rejection sampling with sampled drafts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0
    accept: Literal["exact", "residual"] = "exact"

    @property
    def greedy(self) -> bool:
        # Below 1e-5 the reference takes the argmax as well (golden/NOTES 14).
        return self.temperature < 1e-5

    @property
    def filters(self) -> bool:
        """Whether anything but the temperature shapes the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True)
class Request:
    """One answer to produce.

    prompt:     token ids, not empty
    max_tokens: tokens to produce at most; None = until the context is full
    stop_ids:   tokens that end the answer (they are committed, but are not text)
    stop:       strings that end the answer; the text stops before them
    """

    prompt: Sequence[int]
    max_tokens: int | None = 512
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    id: int = 0


@dataclass(frozen=True)
class Times:
    """Milliseconds of one round. `own` is everything outside the native passes, Python included.

    When several sequences share the passes, each round carries the cost of the whole pass: `Round.shared` says among how many.
    Of a pass that prompts were computed in too, it carries the share of its own tokens.
    """

    draft: float = 0.0
    verify: float = 0.0
    inject: float = 0.0
    own: float = 0.0

    @property
    def total(self) -> float:
        return self.draft + self.verify + self.inject + self.own


@dataclass(frozen=True)
class Round:
    """One draft-verify cycle of one request, or its prefill (`prefill_tokens` is then not None).

    tokens:      committed by this round, in order: accepted draft tokens, then the bonus token (unless a stop cut it)
    text:        what may be shown now; never half a character, never part of a stop string
    drafted:     tokens the drafter proposed;  verified: how many of them the target checked;  accepted: how many were kept
    confidence:  per drafted token, as the drafter gave it; None without a confidence
    source:      which drafter proposed ("" when none did)
    parked:      why speculation is parked; None while speculating
    finish:      why the request ended, in its last round
    shared:      requests that decoded in the same pass
    beside:      prompt tokens of others that were computed in the same pass
    cached:      (prefill only) prompt tokens found in the cache, not computed again
    margins:     by how much two logits had to change for another token, per committed token, when asked for: greedy, the
                 first minus the second; sampled, the same with each token's random number added; None for "residual"
    error:       why the request cannot be served (`finish` is then "error" and nothing was produced)
    """

    request: int
    tokens: tuple[int, ...]
    text: str = ""
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    confidence: tuple[float, ...] | None = None
    source: str = ""
    times: Times = Times()
    parked: str | None = None
    finish: FinishReason | None = None
    shared: int = 1
    beside: int = 0
    prefill_tokens: int | None = None
    cached: int = 0
    margins: tuple[float, ...] | None = None
    error: DsparkError | None = None

    @property
    def is_prefill(self) -> bool:
        return self.prefill_tokens is not None
