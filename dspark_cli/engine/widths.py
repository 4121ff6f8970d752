"""Whether logits depend on how many tokens their pass has. Where they do, verifying may swap words of nearly equal logit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_cli.backends.base import FloatArray, Row, Target

TEXT = "The quick brown fox jumps over the lazy dog and runs into the dark forest, where 12 owls count 345 stars. "
TOKENS = 48  # that are compared; as many of context come before them


def widths_apart(target: Target, widths: Sequence[int]) -> dict[int, float]:
    """How far the logits of passes of each width lie from those of one token at a time: RMS, 0 when every bit is the same.

    Sequence 0 is emptied.
    """
    ids = target.tokenizer.encode(TEXT * (1 + 2 * TOKENS // 16))[: 2 * TOKENS]

    def logits(width: int) -> FloatArray:
        target.rewind(0, TOKENS)
        pieces = [ids[i : i + width] for i in range(TOKENS, 2 * TOKENS, width)]
        # What is left over at the end is a narrower pass, which says nothing about this width.
        whole = [target.step([Row(0, piece)])[0].logits.copy() for piece in pieces if len(piece) == width]
        return np.concatenate(whole)

    target.drop(0)
    target.step([Row(0, ids[:TOKENS], n_logits=0)])
    try:
        alone = logits(1)
        apart = {}
        for width in widths:
            wide = logits(width)
            apart[width] = float(np.sqrt(np.mean((wide - alone[: len(wide)]) ** 2)))
        return apart
    finally:
        target.drop(0)
