"""Shapes of synthetic drafters, and how the tests use one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dspark_cli.backends.base import Draft, DraftRequest, FloatArray, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from synthetic import SPEC

#: f32 keys and values, and no flash attention (it rounds them to f16): the reference has no rounding to excuse
OPTIONS = ContextOptions(ctx=1400, n_seq=3, kv_type="f32", flash_attn="off")
REDUCED = replace(SPEC, draft_vocab=4000)
BARE = replace(SPEC, confidence=False)
LATER = replace(SPEC, sample_from_anchor=False)
NEAR_TIE = 0.05  # logits: passes of different width use different kernels, so a smaller top-2 margin may flip

TEXT = (
    "The lighthouse keeper climbed the stairs every evening, and every evening he counted them aloud: one, two, three."
)
OTHER = "def fibonacci(n):\n    a, b = 0, 1\n    while a < n:\n        print(a, end=' ')\n"


@contextmanager
def opened(path: Path, target: LlamaCppTarget, options: ContextOptions = OPTIONS) -> Iterator[LlamaCppDrafter]:
    with LlamaCppDrafter(path, target, options) as drafter:
        yield drafter


def features_of(target: LlamaCppTarget, tokens: Sequence[int]) -> FloatArray:
    """float32 [n, m*d] of `tokens`, from sequence 0 of the target, which is left empty."""
    parts = []
    for begin in range(0, len(tokens), 500):
        output = target.step([Row(0, tokens[begin : begin + 500], n_logits=1)])[0]
        assert output.features is not None
        parts.append(output.features.copy())
    target.drop(0)
    return np.concatenate(parts)


def propose(drafter: LlamaCppDrafter, anchor: int, block: int = 5, seq: int = 0) -> Draft:
    return drafter.propose([DraftRequest(seq, anchor, block)])[0]


def same(first: Draft, second: Draft) -> None:
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.confidence is not None
    assert second.confidence is not None
    np.testing.assert_allclose(first.confidence, second.confidence, atol=2e-3)
