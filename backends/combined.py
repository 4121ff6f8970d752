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

_Waiting = tuple[list[int], FloatArray | None]  # tokens, and their features [n, m*d] if there are any

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
        self._waiting: dict[int, list[_Waiting]] = {}
        self._size: dict[int, int] = {}  # tokens that wait
        self._length: dict[int, int] = {}  # tokens the model has taken in

    @property
    def pass_block(self) -> int:
        return self.model.block_size

    def quick(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [EMPTY_DRAFT for _ in requests] if self.lookup is None else self.lookup.quick(requests)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self._inject([request.seq for request in requests])
        return self.model.propose(requests)

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        if self.lookup is not None:
            self.lookup.observe(seq, tokens, None)
        waiting = self._waiting.setdefault(seq, [])
        # A view of the target's last pass: it will not be there any more when it is needed.
        waiting.append((list(tokens), None if features is None else features.copy()))
        self._size[seq] = self._size.get(seq, 0) + len(tokens)
        if self._size[seq] >= WAITING:
            self._inject([seq])

    def _inject(self, seqs: Sequence[int]) -> None:
        """Hand over what waits for `seqs`, in one call."""
        began = self._clock()
        committed = []
        for seq in seqs:
            waiting = self._waiting.pop(seq, [])
            self._size[seq] = 0
            if waiting:
                tokens = [token for t, _ in waiting for token in t]
                parts = [f for _, f in waiting if f is not None]
                committed.append((seq, tokens, np.concatenate(parts) if parts else None))
        if committed:
            self.model.observe_all(committed)
            for seq, tokens, _ in committed:
                self._length[seq] = self._length.get(seq, 0) + len(tokens)
            self.inject_ms += (self._clock() - began) * 1e3

    def rewind(self, seq: int, length: int) -> None:
        if self.lookup is not None:
            self.lookup.rewind(seq, length)
        taken = self._length.get(seq, 0)
        if length <= taken:  # also where nothing was taken in: another wrapper may have used the model before
            self.model.rewind(seq, length)
            self._length[seq] = taken = length
        self._wait(seq, _first(self._waiting.get(seq, []), length - taken))

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        if self.lookup is not None:
            self.lookup.fork(source, destination, length)
        taken = self._length.get(source, 0)
        shared = taken if length is None else min(length, taken)
        if shared:
            self.model.fork(source, destination, shared)
        else:
            self.model.drop(destination)
        self._length[destination] = shared
        waiting = self._waiting.get(source, [])
        self._wait(destination, list(waiting) if length is None else _first(waiting, length - shared))

    def _wait(self, seq: int, waiting: list[_Waiting]) -> None:
        self._waiting[seq] = waiting
        self._size[seq] = sum(len(tokens) for tokens, _ in waiting)

    def close(self) -> None:
        self.model.close()


def _first(waiting: Sequence[_Waiting], count: int) -> list[_Waiting]:
    """What waits of the first `count` tokens."""
    kept: list[_Waiting] = []
    for tokens, features in waiting:
        if count <= 0:
            break
        kept.append((tokens[:count], None if features is None else features[:count]))
        count -= len(tokens)
    return kept
