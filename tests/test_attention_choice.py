"""Which attention `auto` means, and that the memory plan and the contexts agree about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny_gguf
from dspark_cli.backends.llamacpp.attention import (
    FEW_SEQUENCES,
    UBATCH,
    UBATCH_SCORES,
    few_sequences,
    flash_word,
    score_bytes,
)
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.widths import widths_apart
from dspark_cli.kernels import cpu_kernels
from dspark_cli.registry.plan import GIB, Device, PlanOptions, make_plan
from dspark_cli.registry.sizes import target_size

CPU = Device("cpu", "cpu", 64 * GIB, 64 * GIB)
GPU = Device("gpu", "cuda", 64 * GIB, 64 * GIB)
OPTIONS = ContextOptions(ctx=1024, gpu_layers=0)


@pytest.mark.parametrize(
    ("word", "kv_type", "on_cpu", "n_seq", "few", "expected"),
    [
        ("auto", "f16", True, 1, 1, "off"),
        ("auto", "f16", True, 2, 1, "on"),
        ("auto", "f32", True, FEW_SEQUENCES, FEW_SEQUENCES, "off"),
        ("auto", "f16", True, FEW_SEQUENCES + 1, FEW_SEQUENCES, "on"),
        ("auto", "q8_0", True, 1, 1, "on"),  # libllama refuses a quantized V without flash
        ("auto", "f16", True, 1, 0, "on"),
        ("auto", "f16", False, 1, 1, "auto"),
        ("on", "f16", True, 1, 1, "on"),
        ("off", "f16", False, 64, 0, "off"),
    ],
)
def test_what_auto_means(word: str, kv_type: str, on_cpu: bool, n_seq: int, few: int, expected: str) -> None:
    assert flash_word(word, kv_type, on_cpu, n_seq, few=few) == expected


def test_scores_are_planned_where_they_are_written(embedded_gguf: Path) -> None:
    floats = replace(target_size(embedded_gguf), few_sequences=FEW_SEQUENCES)

    def scores(device: Device = CPU, **options: object) -> int:
        return make_plan(device, "llamacpp", floats, None, PlanOptions(ctx=2048, **options)).target.scores  # type: ignore[arg-type]

    assert target_size(embedded_gguf).few_sequences == few_sequences("Q4_1") == int(cpu_kernels.complete())
    other = replace(floats, few_sequences=0)
    assert make_plan(CPU, "llamacpp", other, None, PlanOptions(ctx=2048)).target.scores == 0
    assert scores() == score_bytes(9, 2048, UBATCH_SCORES)
    assert scores(n_seq=FEW_SEQUENCES) == FEW_SEQUENCES * scores()
    assert scores(flash_attn="on") == scores(n_seq=FEW_SEQUENCES + 1) == scores(kv_type="q8_0") == scores(GPU) == 0
    assert scores(GPU, flash_attn="off") > 0


@pytest.mark.parametrize("used", [False, True])
def test_formats_whose_passes_agree(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "complete", lambda: used)
    assert few_sequences("F16") == FEW_SEQUENCES
    assert few_sequences("Q4_K_M") == few_sequences("Q8_0") == int(used)
    assert few_sequences("IQ4_XS") == 0


def test_contexts_are_made_with_it(embedded_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "complete", lambda: False)
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


@pytest.mark.skipif(not cpu_kernels.complete(), reason="with ggml's own products no attention does")
def test_without_flash_a_quantized_target_does_not_depend_on_the_width_of_its_passes(embedded_gguf: Path) -> None:
    """Why `auto` does without flash attention there: with it last bits grow to some tenths of a logit beyond 256 tokens."""
    with LlamaCppTarget(embedded_gguf, OPTIONS) as target:
        assert target.info.details["flash_attn"] == "off"
        assert widths_apart(target, [5])[5] == 0
