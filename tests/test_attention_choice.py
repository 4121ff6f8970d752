"""Which attention `auto` means, and that the memory plan and the contexts agree about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny_gguf
from dspark_cli.backends.llamacpp.attention import FEW_SEQUENCES, UBATCH, UBATCH_SCORES, flash_word, score_bytes
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.widths import widths_apart
from dspark_cli.registry.plan import GIB, Device, PlanOptions, make_plan
from dspark_cli.registry.sizes import target_size

CPU = Device("cpu", "cpu", 64 * GIB, 64 * GIB)
GPU = Device("gpu", "cuda", 64 * GIB, 64 * GIB)
OPTIONS = ContextOptions(ctx=1024, gpu_layers=0)


@pytest.mark.parametrize(
    ("word", "kv_type", "on_cpu", "n_seq", "quantized", "expected"),
    [
        ("auto", "f16", True, 1, False, "off"),
        ("auto", "f32", True, FEW_SEQUENCES, False, "off"),
        ("auto", "f16", True, FEW_SEQUENCES + 1, False, "on"),
        ("auto", "q8_0", True, 1, False, "on"),  # libllama refuses a quantized V without flash
        ("auto", "f16", True, 1, True, "on"),
        ("auto", "f16", False, 1, False, "auto"),
        ("on", "f16", True, 1, False, "on"),
        ("off", "f16", False, 64, True, "off"),
    ],
)
def test_what_auto_means(word: str, kv_type: str, on_cpu: bool, n_seq: int, quantized: bool, expected: str) -> None:
    assert flash_word(word, kv_type, on_cpu, n_seq, quantized=quantized) == expected


def test_scores_are_planned_where_they_are_written(embedded_gguf: Path) -> None:
    quantized = target_size(embedded_gguf)
    floats = replace(quantized, quantized=False)

    def scores(device: Device = CPU, **options: object) -> int:
        return make_plan(device, "llamacpp", floats, None, PlanOptions(ctx=2048, **options)).target.scores  # type: ignore[arg-type]

    assert quantized.quantized
    assert make_plan(CPU, "llamacpp", quantized, None, PlanOptions(ctx=2048)).target.scores == 0
    assert scores() == score_bytes(9, 2048, UBATCH_SCORES)
    assert scores(n_seq=FEW_SEQUENCES) == FEW_SEQUENCES * scores()
    assert scores(flash_attn="on") == scores(n_seq=FEW_SEQUENCES + 1) == scores(kv_type="q8_0") == scores(GPU) == 0
    assert scores(GPU, flash_attn="off") > 0


def test_contexts_are_made_with_it(embedded_gguf: Path, tmp_path: Path) -> None:
    floats = tiny_gguf.write_tiny_target(tmp_path / "tiny.F32.gguf")
    for path, options, flash, rows in (
        (embedded_gguf, OPTIONS, "on", UBATCH),
        (embedded_gguf, OPTIONS.drafting(), "off", UBATCH_SCORES),
        (floats, OPTIONS, "off", UBATCH_SCORES),
        (floats, replace(OPTIONS, kv_type="q8_0"), "on", UBATCH),
        (floats, replace(OPTIONS, ubatch=64), "off", 64),
    ):
        with LlamaCppTarget(path, replace(options, ctx=512)) as target:
            assert (target.info.details["flash_attn"], target.context.max_ubatch) == (flash, rows)


def test_a_quantized_target_hardly_depends_on_the_width_of_its_passes(embedded_gguf: Path) -> None:
    """Why `auto` keeps flash attention there: without it last bits grow to 0.2 logits (on most CPUs with it they do not)."""

    def apart(options: ContextOptions) -> float:
        with LlamaCppTarget(embedded_gguf, options) as target:
            return widths_apart(target, [5])[5]

    assert apart(OPTIONS) <= apart(replace(OPTIONS, flash_attn="off")) / 4
