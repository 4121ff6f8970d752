"""Keys and values of a target: one static store, rows written at their own positions, behind transformers' cache protocol.

Sequence s is slot s of the store; position p is row p. A pass writes its rows past what a sequence holds, so a rewind only
changes a length. Padding is written to one spare row behind the context, and sees the first key alone: never nothing, or
the softmax would give NaN.

Shapes: N = sequences in the pass, L = its columns, S = keys read, K = KV heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dspark_cli.backends.torch.store import RowStore

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Place:
    """Where the columns of one pass stand.

    slots:     the sequences, in order
    positions: int64 [N, L]  position of each column (rotary, and what it may see); 0 for padding
    write_at:  int64 [N, L]  row of the store it is written to; the spare row for padding
    keys:      S, rows of the store that are read: above every position
    """

    slots: Sequence[int]
    positions: Tensor
    write_at: Tensor
    keys: int

    def mask(self, window: int | None) -> Tensor:
        """bool [N, 1, L, S], True = visible: keys up to the own position; with a window only the nearest so many."""
        keys = torch.arange(self.keys, device=self.positions.device)
        queries = self.positions.unsqueeze(-1)
        visible = keys <= queries
        if window is not None:
            visible = visible & (keys > queries - window)
        return visible.unsqueeze(1)


class KeyValues(Cache):
    """What a model's layers call during a pass; `place` says where the pass stands."""

    def __init__(self, shapes: Mapping[int, tuple[int, int, int]], n_seq: int, n_ctx: int, like: Tensor) -> None:
        """shapes: layer -> KV heads, width of a key, width of a value; `like` has the dtype and the device."""
        super().__init__(layers=[])
        rows: dict[str, tuple[int, ...]] = {}
        for layer, (heads, key, value) in shapes.items():
            rows |= {f"k{layer}": (heads, key), f"v{layer}": (heads, value)}
        self.store = RowStore(rows, dtype=like.dtype, device=like.device)
        self.spare = n_ctx
        self.store.reserve(n_seq, n_ctx + 1)
        self.place: Place | None = None
        self._slots: dict[tuple[int, ...], Tensor] = {}

    def at(self, place: Place) -> KeyValues:
        """This cache for a pass at `place`."""
        self.place = place
        key = tuple(place.slots)
        if key not in self._slots:  # kept: a captured pass reads it again and again
            self._slots[key] = torch.tensor(key, device=self.store.device)
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [N, K, L, D] of a layer and give back everything that may be seen, [N, K, S, D]."""
        place = self.place
        assert place is not None
        slots = self._slots[tuple(place.slots)]
        found = []
        for name, new in ((f"k{layer_idx}", key_states), (f"v{layer_idx}", value_states)):
            self.store.put_at(name, slots, place.write_at, new.transpose(1, 2))
            found.append(self.store.view(name, place.slots, place.keys).transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so no layer may depend on this."""
        del layer_idx
        return 0


class ShapeProbe(Cache):
    """Stands in for the cache in one pass, to see what the layers want to keep; caches nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        del layer_idx
        return 0
