"""Whether logits depend on how many tokens their pass has. Where they do, verifying may swap words of nearly equal logit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_cli.backends.base import FloatArray, Row, Target

TEXT = "The quick brown fox jumps over the lazy dog and runs into the dark forest, where 12 owls count 345 stars. "
COMPARED = 48  # tokens
#: tokens of context before them; some kernels share a long context among threads only when one token asks
DEPTHS = (48, 640)


def widths_apart(target: Target, widths: Sequence[int], depth: int = DEPTHS[0]) -> dict[int, float]:
    """How far the logits of passes of each width lie from those of one token at a time: RMS, 0 when every bit is the same.

    depth: tokens of context before the first pass. Sequence 0 is emptied.
    """
    ids = (target.tokenizer.encode(TEXT) * (depth + COMPARED))[: depth + COMPARED]

    def logits(width: int) -> FloatArray:
        target.rewind(0, depth)
        pieces = [ids[i : i + width] for i in range(depth, len(ids), width)]
        # What is left over at the end is a narrower pass, which says nothing about this width.
        whole = [target.step([Row(0, piece)])[0].logits.copy() for piece in pieces if len(piece) == width]
        return np.concatenate(whole)

    target.drop(0)
    try:
        for begin in range(0, depth, target.max_rows):
            target.step([Row(0, ids[begin : min(begin + target.max_rows, depth)], n_logits=0)])
        alone = logits(1)
        apart = {}
        for width in widths:
            wide = logits(width)
            apart[width] = float(np.sqrt(np.mean((wide - alone[: len(wide)]) ** 2)))
        return apart
    finally:
        target.drop(0)
