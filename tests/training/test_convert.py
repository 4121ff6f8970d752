"""`dspark convert`: round trips between safetensors and GGUF, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from typer.testing import CliRunner

from dspark_cli.backends.base import DsparkError
from dspark_cli.backends.llamacpp.quants import Formats
from dspark_cli.backends.torch.checkpoint import build, load_drafter
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.export import save_drafter
from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter, save_gguf_drafter, target_tables
from dspark_cli.cli import app


def drafter(target: Path, **changes: object) -> DSpark:
    """A drafter of random weights for the tiny target, with its embedding and head."""
    torch.manual_seed(1)
    shape: dict[str, object] = {
        "kind": "dspark", "family": "qwen3", "hidden_size": 64, "target_hidden_size": 64, "intermediate_size": 96,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 49152, "draft_vocab_size": 640,
        "block_size": 4, "target_layer_ids": (-1, 1, 2), "mask_token_id": 17, "num_target_layers": 4, "rope_theta": 5e4,
        "max_position_embeddings": 1024, "markov_rank": 32, "confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    model = build(DrafterConfig(**(shape | changes)))  # type: ignore[arg-type]
    assert isinstance(model, DSpark)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + ("norm" in name))
        embedding = target_tables(target).embed_tokens
        model.embed_tokens.weight.copy_(embedding)
        if model.d2t is None:
            model.lm_head.weight.copy_(embedding)
        else:
            model.d2t.copy_(torch.randperm(49152)[: len(model.d2t)].sort().values)
            model.lm_head.weight.copy_(embedding[model.d2t])
    return model


def same(first: DSpark, second: DSpark, atol: float = 0.0) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name].to(value.dtype), atol=atol, rtol=0, msg=name)


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab_size": 49152},
        {"sample_from_anchor": False},
        {"kind": "dflash", "markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False},
    ],
    ids=["reduced", "whole vocabulary", "anchor is context", "dflash"],
)
def test_safetensors_to_gguf_and_back_is_the_same_drafter(
    tiny_target: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    model = drafter(tiny_target, **changes)
    save_drafter(model, tmp_path / "st")
    for step in (
        (tmp_path / "st", tmp_path / "d.gguf", "--format", "F32"),
        (tmp_path / "d.gguf", tmp_path / "back"),
    ):
        result = run(*step, "--target", tiny_target)
        assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    back = load_drafter(tmp_path / "back")
    assert isinstance(back, DSpark)
    same(model, back)
    ours, theirs = model.config, back.config
    for name in (
        "kind",
        "block_size",
        "sample_from_anchor",
        "target_layer_ids",
        "mask_token_id",
        "rope_theta",
        "head_dim",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(("quant", "atol"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q5_1", 0.05), ("Q4_0", 0.2)])
def test_quantized_files_hold_the_same_drafter_within_their_rounding(
    tiny_target: Path, tmp_path: Path, quant: str, atol: float
) -> None:
    model = drafter(tiny_target)
    path = save_gguf_drafter(model, tmp_path / "d.gguf", tiny_target, Formats("F16", "Q8_0", quant))
    back = load_gguf_drafter(path, tiny_target)
    assert isinstance(back, DSpark)
    w1 = back.markov_head.markov_w1.weight  # type: ignore[union-attr]
    torch.testing.assert_close(w1, model.markov_head.markov_w1.weight, atol=atol, rtol=0)  # type: ignore[union-attr]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["markov_w1.weight"] == quant
    assert types["markov_w2.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert back.d2t is not None
    assert torch.equal(back.d2t, model.d2t)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"markov_head_type": "gated"}, "a gated head has no form"), ({"softcap": 30.0}, "logit softcapping has no form")],
)
def test_what_libllama_cannot_run_is_not_written(
    tiny_target: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DsparkError, match=message):
        save_gguf_drafter(drafter(tiny_target, **changes), tmp_path / "d.gguf", tiny_target)
    assert not (tmp_path / "d.gguf").exists()


def test_refusals_say_what_to_type(tiny_target: Path, tmp_path: Path) -> None:
    save_drafter(drafter(tiny_target), tmp_path / "st")
    missing = run(tmp_path / "no", tmp_path / "d.gguf", "--target", tiny_target)
    assert "does not exist" in missing.output  # type: ignore[attr-defined]
    without = run(tmp_path / "st", tmp_path / "d.gguf")
    assert "--target MODEL" in without.output  # type: ignore[attr-defined]
    (tmp_path / "there").mkdir()
    there = run(tmp_path / "st", tmp_path / "there")
    assert "--force" in there.output  # type: ignore[attr-defined]
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    (pickle / "config.json").write_text((tmp_path / "st" / "config.json").read_text())
    (pickle / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused = run(pickle, tmp_path / "d.gguf", "--target", tiny_target)
    assert refused.exit_code == 1  # type: ignore[attr-defined]
    assert "pickled weights only" in refused.output  # type: ignore[attr-defined]


def test_a_drafter_of_another_target_is_refused(tiny_target: Path, tmp_path: Path, embedded_gguf: Path) -> None:
    save_drafter(drafter(tiny_target), tmp_path / "st")
    result = run(tmp_path / "st", tmp_path / "d.gguf", "--target", embedded_gguf)
    assert result.exit_code == 1  # type: ignore[attr-defined]
    assert "hidden size 64" in result.output  # type: ignore[attr-defined]
