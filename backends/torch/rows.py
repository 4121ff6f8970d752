"""Rows of the contract as the tables of one pass, and a pass's arrays as each row's part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_cli.backends.base import FloatArray, Row, RowOutput
from dspark_cli.backends.torch.network import PassOutput


def n_logits(row: Row) -> int:
    """How many of the row's last tokens need logits."""
    return len(row.tokens) if row.n_logits is None else row.n_logits


def padded(rows: Sequence[Sequence[int]], starts: Sequence[int], width: int, spare: int) -> Tensor:
    """int64 [3, N, width]: ids, positions and store rows of `rows` that begin at `starts`; padding as in cache.py."""
    table = torch.zeros(3, len(rows), width, dtype=torch.int64)
    table[2] = spare
    for i, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        count = len(tokens)
        table[0, i, :count] = torch.as_tensor(tokens)
        table[1:, i, :count] = torch.arange(start, start + count)
    return table


def columns_of(rows: Sequence[Row]) -> list[int]:
    """Columns of the pass in which some row wants logits, in order."""
    wanted: set[int] = set()
    for row in rows:
        count = n_logits(row)
        wanted.update(range(len(row.tokens) - count, len(row.tokens)))
    return sorted(wanted)


def split(rows: Sequence[Row], places: Sequence[int], columns: Sequence[int], output: PassOutput) -> list[RowOutput]:
    """Each row's part of a pass: row i lies at index places[i], its logits were computed for `columns` (ascending).

    What only pads the pass stays on the device: a vocabulary of logits is the largest thing that crosses.
    """
    width = max(len(row.tokens) for row in rows)
    wanted = sum(column < width for column in columns)
    logits, hidden = _to_host(output.logits, places, wanted), _to_host(output.hidden, places, wanted)
    features = _to_host(output.features, places, width)
    assert logits is not None
    found = []
    for i, row in enumerate(rows):
        count = n_logits(row)
        first = columns.index(len(row.tokens) - count) if count else 0
        mine = slice(first, first + count)
        found.append(
            RowOutput(
                logits[i, mine],
                None if features is None else features[i, : len(row.tokens)],
                None if hidden is None else hidden[i, mine],
            )
        )
    return found


def _to_host(values: Tensor | None, places: Sequence[int], columns: int) -> FloatArray | None:
    """float32 of the first `columns` of [n, C, width] at `places`."""
    if values is None:
        return None
    part = values[:, :columns]
    if list(places) != list(range(len(part))):
        part = part[list(places)]
    host: FloatArray = part.float().cpu().numpy()
    return host
