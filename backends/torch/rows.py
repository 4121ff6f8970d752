"""Rows of the contract as the tables of one pass, and a pass's arrays as each row's part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_cli.backends.base import Row, RowOutput
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
    """Each row's part of a pass: row i lies at index places[i], its logits were computed for `columns`."""
    logits = output.logits.float().cpu().numpy()
    features = None if output.features is None else output.features.float().cpu().numpy()
    hidden = None if output.hidden is None else output.hidden.float().cpu().numpy()
    found = []
    for row, place in zip(rows, places, strict=True):
        count = n_logits(row)
        first = columns.index(len(row.tokens) - count) if count else 0
        mine = slice(first, first + count)
        found.append(
            RowOutput(
                logits[place, mine],
                None if features is None else features[place, : len(row.tokens)],
                None if hidden is None else hidden[place, mine],
            )
        )
    return found
