"""On a CPU an answer is the same to the bit whatever is decoded beside it, within `Target.steady_rows`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dspark_cli.backends.base import FloatArray, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.bench.formats import requantize

N_SEQ, LENGTH, STEPS = 6, 30, 4


def forced(target: LlamaCppTarget, order: list[int], width: int, pad: int) -> dict[int, FloatArray]:
    """Logits [STEPS, V] of a fixed text for each of `order`'s sequences, `width` of them in a pass, `pad` rows beside."""
    random = np.random.default_rng(7)
    texts = random.integers(100, 40_000, size=(N_SEQ, LENGTH)).tolist()
    rows: dict[int, list[FloatArray]] = {s: [] for s in order}
    for seq in range(N_SEQ):
        target.drop(seq)
    begin = 0
    for end in (LENGTH - STEPS, *range(LENGTH - STEPS + 1, LENGTH + 1)):
        for first in range(0, len(order), width if begin else 1):
            group = order[first : first + (width if begin else 1)]
            beside = [Row(N_SEQ - 1, texts[-1][:pad], 0)] if pad and N_SEQ - 1 not in group else []
            outputs = target.step([*(Row(s, texts[s][begin:end], 1) for s in group), *beside])
            for seq, output in zip(group, outputs, strict=False):
                if begin:
                    rows[seq].append(output.logits[-1].copy())
            target.drop(N_SEQ - 1)
        begin = end
    return {s: np.stack(found) for s, found in rows.items()}


#: largest change of a logit; where several rows are multiplied by other kernels than few, the last bits differ
CHANGE = {"Q4_1": 0.0, "F16": 0.02, "Q8_0": 0.0}


@pytest.mark.parametrize("form", CHANGE)
def test_logits_do_not_depend_on_neighbours(
    form: str, embedded_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = embedded_gguf if form == "Q4_1" else requantize(embedded_gguf, form, tmp_path_factory.mktemp("formats"))
    with LlamaCppTarget(path, ContextOptions(ctx=256, n_seq=N_SEQ)) as target:
        least, most = target.steady_rows
        assert (least, most) == (2, 63)
        base = forced(target, [0], 1, pad=1)
        for order, width, pad in (([0, 1, 2, 3, 4], 5, 1), ([4, 3, 0], 3, 20), ([2, 0], 1, 36), ([3, 0], 2, 9)):
            other = forced(target, order, width, pad)
            changed = float(np.abs(base[0] - other[0]).max())
            print(form, order, width, pad, changed)
            assert changed <= CHANGE[form], (order, width, pad)
