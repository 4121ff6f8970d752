"""Several drafters as one: lookup offers what it finds for nothing, a model drafter drafts by its pass when asked.

What was committed reaches the lookup at once, and the model when it drafts next: while it is parked its features wait, and
go in together. The schedule decides by `quick` drafts whether a pass is worth its price.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from dspark_cli.backends.base import EMPTY_DRAFT, Draft, Drafter, DraftRequest, FloatArray
from dspark_cli.backends.lookup import LookupDrafter

WAITING = 512  # tokens of a sequence whose features may wait: then they go in, to bound memory


class CombinedDrafter(Drafter):
    """`model` with features put off until they are needed, and lookup beside it unless `lookup` is None.

    clock: seconds, from any start
    """

    def __init__(
        self, model: Drafter, lookup: LookupDrafter | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.model, self.lookup = model, lookup
        self.kind = model.kind
        self.name = model.name if lookup is None else f"{model.name} + lookup"
        self.block_size = max(model.block_size, lookup.block_size if lookup else 0)
        self.feature_layers = model.feature_layers
        self.inject_ms = 0.0
        self._clock = clock
        self._waiting: dict[int, list[tuple[list[int], FloatArray | None]]] = {}
        self._length: dict[int, int] = {}  # tokens the model has taken in
        self._from_lookup: dict[int, bool] = {}  # whether the last draft of a sequence was lookup's

    @property
    def pass_block(self) -> int:
        return self.model.block_size

    def quick(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = [EMPTY_DRAFT for _ in requests] if self.lookup is None else self.lookup.quick(requests)
        self._from_lookup.update((request.seq, True) for request in requests)
        return drafts

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        for request in requests:
            self._inject(request.seq)
            self._from_lookup[request.seq] = False
        return self.model.propose(requests)

    def feedback(self, seq: int, verified: int, accepted: int) -> None:
        if not self._from_lookup.get(seq, False):
            self.model.feedback(seq, verified, accepted)
        elif self.lookup is not None:
            self.lookup.feedback(seq, verified, accepted)

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        if self.lookup is not None:
            self.lookup.observe(seq, tokens, None)
        waiting = self._waiting.setdefault(seq, [])
        # A view of the target's last pass: it will not be there any more when it is needed.
        waiting.append((list(tokens), None if features is None else features.copy()))
        if sum(len(t) for t, _ in waiting) >= WAITING:
            self._inject(seq)

    def _inject(self, seq: int) -> None:
        """Hand over what waits for `seq`, in one call."""
        waiting = self._waiting.pop(seq, [])
        if not waiting:
            return
        began = self._clock()
        tokens = [token for t, _ in waiting for token in t]
        parts = [f for _, f in waiting if f is not None]
        self.model.observe(seq, tokens, np.concatenate(parts) if parts else None)
        self._length[seq] = self._length.get(seq, 0) + len(tokens)
        self.inject_ms += (self._clock() - began) * 1e3

    def rewind(self, seq: int, length: int) -> None:
        if self.lookup is not None:
            self.lookup.rewind(seq, length)
        taken = self._length.get(seq, 0)
        if length <= taken:
            self.model.rewind(seq, length)
            self._length[seq] = length
            self._waiting.pop(seq, None)
            return
        room, kept = length - taken, []
        for tokens, features in self._waiting.pop(seq, []):
            if room > 0:
                kept.append((tokens[:room], None if features is None else features[:room]))
            room -= len(tokens)
        self._waiting[seq] = kept

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        if self.lookup is not None:
            self.lookup.fork(source, destination, length)
        self._inject(source)
        self._waiting.pop(destination, None)
        self.model.fork(source, destination, length)
        taken = self._length.get(source, 0)
        self._length[destination] = taken if length is None else min(length, taken)

    def close(self) -> None:
        self.model.close()
