"""Per-sequence rows that only ever grow at the end: context keys and values, fused features.

Every sequence has a slot; row i of a slot belongs to position i. Rows past a slot's length are scratch space: a block's
own keys are written there, read in the same pass, and overwritten later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FIRST_CAPACITY = 256


class RowStore:
    """Named buffers [slots, capacity, *row] that share one length a slot. Slots and capacity double when needed."""

    def __init__(self, rows: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers = {name: torch.zeros(0, 0, *row, dtype=dtype, device=device) for name, row in rows.items()}
        self._lengths: list[int] = []

    @property
    def shape(self) -> tuple[int, int]:
        """(slots, rows a slot can hold)."""
        buffer = next(iter(self._buffers.values()))
        return buffer.shape[0], buffer.shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self._buffers.values())).device

    @property
    def size_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def length(self, slot: int) -> int:
        return self._lengths[slot] if slot < len(self._lengths) else 0

    def clear(self) -> None:
        """Forget every slot and give the memory back."""
        self._buffers = {name: buffer.new_zeros(0, 0, *buffer.shape[2:]) for name, buffer in self._buffers.items()}
        self._lengths = []

    def rewind(self, slot: int, length: int) -> None:
        """Forget rows from `length` on."""
        if slot < len(self._lengths):
            self._lengths[slot] = min(self._lengths[slot], length)

    def advance(self, slot: int, count: int) -> None:
        """`count` rows written after the end become part of the slot."""
        self._lengths[slot] += count

    def reserve(self, slots: int, rows: int) -> None:
        """Make room for `slots` slots of `rows` rows."""
        have_slots, have_rows = self.shape
        if slots > have_slots or rows > have_rows:
            self._resize(_doubled(have_slots, slots, 1), _doubled(have_rows, rows, FIRST_CAPACITY))
        self._lengths += [0] * (self.shape[0] - len(self._lengths))

    def _resize(self, slots: int, rows: int) -> None:
        have_slots, used = self.shape[0], max(self._lengths, default=0)
        for name, old in self._buffers.items():
            new = old.new_zeros(slots, rows, *old.shape[2:])
            new[:have_slots, :used] = old[:, :used]
            self._buffers[name] = new

    def put(self, name: str, slot: int, rows: Tensor) -> None:
        """Write rows [n, *row] after the end of `slot` (room must be reserved)."""
        start = self._lengths[slot]
        self._buffers[name][slot, start : start + len(rows)] = rows

    def put_at(self, name: str, slots: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Write rows [N, n, *row] of `slots` [N] at `positions` [N, n]."""
        self._buffers[name][slots.unsqueeze(1), positions] = rows

    def view(self, name: str, slots: Sequence[int], rows: int) -> Tensor:
        """Rows 0..rows-1 of `slots` [N, rows, *row]: a view when the slots are consecutive, else a copy."""
        first, count = slots[0], len(slots)
        if list(slots) == list(range(first, first + count)):
            return self._buffers[name][first : first + count, :rows]
        return self._buffers[name][list(slots), :rows]

    @torch.inference_mode()  # buffers made while drafting may be written in no other mode
    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        """`destination` becomes a copy of the first `length` rows of `source`."""
        length = self.length(source) if length is None else min(length, self.length(source))
        self.reserve(max(source, destination) + 1, length)
        if source != destination:
            for buffer in self._buffers.values():
                buffer[destination, :length] = buffer[source, :length]
        self._lengths[destination] = length


def _doubled(have: int, need: int, least: int) -> int:
    return have if need <= have else max(need, 2 * have, least)
