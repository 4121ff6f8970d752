"""How far logits of wide passes lie from those of single tokens, on a target whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import tiny_gguf
from dspark_cli.backends.base import Row, RowOutput
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.widths import widths_apart


class Off(LlamaCppTarget):
    """Says 0.5 more of every logit in passes of four tokens and more."""

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        outputs = super().step(rows)
        if len(rows[0].tokens) < 4:
            return outputs
        return [RowOutput(o.logits + np.float32(0.5), o.features, o.hidden) for o in outputs]


@pytest.mark.parametrize(("target", "expected"), [(LlamaCppTarget, 0.0), (Off, 0.5)])
@pytest.mark.parametrize("depth", [48, 200])
def test_widths_apart(tmp_path: Path, target: type[LlamaCppTarget], expected: float, depth: int) -> None:
    path = tiny_gguf.write_tiny_target(tmp_path / "tiny.F32.gguf")
    with target(path, ContextOptions(ctx=256, kv_type="f32")) as opened:
        apart = widths_apart(opened, [1, 3, 4, 7], depth)
        assert opened.length(0) == 0
    assert apart[1] == 0.0
    assert apart[3] == pytest.approx(0.0, abs=1e-3)
    assert apart[4] == pytest.approx(expected, abs=1e-3)
    assert apart[7] == pytest.approx(expected, abs=1e-3)
