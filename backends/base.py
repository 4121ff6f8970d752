"""What the engine asks of a target and a drafter.

A backend implements `Target` and any number of `Drafter`s. The engine knows nothing else about it: features cross as
arrays, so a drafter of one backend may serve a target of another.

Throughout: V = vocabulary of the target, d = its hidden size, m = number of target layers a drafter reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dspark_cli.backends.errors import BadInput, ContextFull, DsparkError, NotReady, PairMismatch

__all__ = [
    "EMPTY_DRAFT",
    "BadInput",
    "ContextFull",
    "Draft",
    "DraftRequest",
    "Drafter",
    "DsparkError",
    "FloatArray",
    "IntArray",
    "NotReady",
    "PairMismatch",
    "Row",
    "RowOutput",
    "Target",
    "TargetInfo",
    "Tokenizer",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Consecutive tokens of one sequence in a target pass.

    seq:      which sequence
    tokens:   the tokens, at positions length(seq) .. length(seq) + len(tokens) - 1
    n_logits: how many of the last tokens need logits; None = all of them
    """

    seq: int
    tokens: Sequence[int]
    n_logits: int | None = None


@dataclass(frozen=True)
class RowOutput:
    """What a target pass says about one `Row`. Arrays are views: valid until the next pass of that target.

    logits:   float32 [n_logits, V]
    features: float32 [len(tokens), m*d]  hidden states after the layers asked for, concatenated; None if none were asked
    hidden:   float32 [n_logits, d]  final normed hidden states, what the output head reads; None unless asked for
    """

    logits: FloatArray
    features: FloatArray | None
    hidden: FloatArray | None = None


@dataclass(frozen=True)
class TargetInfo:
    """Facts about a loaded target, for people and for pair checks.

    format:   quantization or dtype ("Q4_1", "F16", "bf16")
    device:   where the weights are ("cpu", "cuda:0", ...)
    n_ctx:    positions one sequence may hold
    n_seq:    sequences that may be open at once
    details:  backend facts worth printing in `doctor` (threads, KV type, ...)
    crowded:  whether the attention of a token passes over the cached tokens of all sequences, not its own only
    """

    name: str
    path: str
    backend: str
    format: str
    device: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_ctx: int
    n_seq: int
    details: dict[str, Any] = field(default_factory=dict)
    crowded: bool = False


class Tokenizer(ABC):
    """Text to ids and back, as the target's own vocabulary has it."""

    n_vocab: int
    bos_id: int | None
    #: every token that ends a turn, not only the first EOS
    eog_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of `text`. `special`: markers such as <|im_end|> become control tokens; `bos`: begin with the BOS token."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Raw bytes of one token (may be part of a UTF-8 character); control tokens give b""."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")


class Target(ABC):
    """The model whose text is reproduced. One context, several sequences, cached keys and values.

    Use it as a context manager: leaving it frees everything native.
    """

    info: TargetInfo
    tokenizer: Tokenizer
    #: tokens one `step` may hold over all its rows
    max_rows: int
    #: milliseconds spent inside native passes so far: what is not in here is overhead of ours
    native_ms: float = 0.0

    @abstractmethod
    def render_chat(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        """The prompt text for `messages` (`role`, `content`), ready for the assistant's answer.

        Raises DsparkError when the model has no chat template or the template refuses the messages.
        """

    @abstractmethod
    def request_features(self, layers: Sequence[int]) -> None:
        """From now on, return hidden states after these decoder layers (0-based; -1 = embeddings). [] switches them off.

        Raises PairMismatch for a layer the target does not have.
        """

    @abstractmethod
    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        """One pass over `rows` (at most `max_rows` tokens, one row a sequence); their tokens are appended to the cache."""

    @abstractmethod
    def length(self, seq: int) -> int:
        """Tokens of `seq` in the cache."""

    @abstractmethod
    def rewind(self, seq: int, length: int) -> None:
        """Forget everything of `seq` from position `length` on."""

    @abstractmethod
    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        """Make `destination` share the first `length` tokens of `source` (all of them by default)."""

    def drop(self, seq: int) -> None:
        """Forget the sequence."""
        self.rewind(seq, 0)

    @abstractmethod
    def close(self) -> None:
        """Free everything. Calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Draft:
    """What a drafter proposes after one anchor.

    tokens:     int64   [k]     k <= the block asked for; may be empty
    confidence: float32 [k]     P(token i accepted | all earlier accepted); None if the drafter cannot say
    probs:      float32 [k, V]  the distribution each token was *sampled* from; None where the output does not hang on it
    source:     which drafter made it, when several share a loop ("lookup", "dspark", ...)
    """

    tokens: IntArray
    confidence: FloatArray | None = None
    probs: FloatArray | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    def prefix(self, length: int) -> Draft:
        """The first `length` tokens with what belongs to them."""
        if length >= len(self.tokens):
            return self
        return Draft(
            self.tokens[:length],
            None if self.confidence is None else self.confidence[:length],
            None if self.probs is None else self.probs[:length],
            self.source,
        )


EMPTY_DRAFT = Draft(np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class DraftRequest:
    """One sequence that wants a draft.

    anchor: the last committed token, not yet in any cache
    block:  tokens wanted at most
    choose: says which token to draft: (logits float32 [W], drafted so far, the W tokens they are of or None for all) ->
            (token, probs float32 [V] that it was sampled from, or None where the output does not hang on it).
            None asks for the best tokens.
    """

    seq: int
    anchor: int
    block: int
    choose: Any = None


#: tokens committed to the target's cache of a sequence, and their features if asked for: float32 [len(tokens), m*d]
Committed = tuple[int, Sequence[int], FloatArray | None]


class Drafter(ABC):
    """Proposes tokens after an anchor. Keeps one state a sequence, of the tokens it has observed.

    Call order per round: `quick`, then maybe `propose`, then after verification `observe` with the anchor and the accepted
    tokens.
    What `propose` itself put in a cache is the drafter's own business: it must be gone, or reused, at the next call.
    """

    name: str
    kind: str  # dspark, dflash, eagle3, small, lookup
    block_size: int
    #: target layers whose outputs `observe` needs; () = none
    feature_layers: tuple[int, ...] = ()
    #: whether `propose` costs a pass of a model; without one, `quick` is all there is
    has_pass: bool = True
    #: milliseconds of `observe` that were put off until `propose`, so far
    inject_ms: float = 0.0

    @property
    def pass_block(self) -> int:
        """Tokens that one `propose` drafts at most; `block_size` also covers `quick`."""
        return self.block_size

    def quick(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Drafts that cost no pass, in order; empty ones from a drafter that has none."""
        return [EMPTY_DRAFT for _ in requests]

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """A draft for each request, in order. All sequences share one pass where the drafter has passes."""

    @abstractmethod
    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        """`tokens` were committed to the target's cache of `seq`; features float32 [len(tokens), m*d] if asked for."""

    def observe_all(self, committed: Sequence[Committed]) -> None:
        """`observe` for several sequences, each once; in one pass where that is possible."""
        for seq, tokens, features in committed:
            self.observe(seq, tokens, features)

    @abstractmethod
    def rewind(self, seq: int, length: int) -> None:
        """Forget everything of `seq` from position `length` on."""

    @abstractmethod
    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        """Make `destination` share the first `length` observed tokens of `source`."""

    def drop(self, seq: int) -> None:
        """Forget the sequence."""
        self.rewind(seq, 0)

    def close(self) -> None:  # noqa: B027  (most drafters hold nothing native)
        """Free everything. Calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
