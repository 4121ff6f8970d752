"""config.json of every dialect, and what a config may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from dspark_cli.backends.torch.config import BadCheckpoint
from dspark_cli.backends.torch.dialects import parse_config, read_config
from dspark_cli.backends.torch.export import deepspec_json

LAYERS = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
    "rms_norm_eps": 1e-5,
}
DEEPSPEC = {
    **LAYERS,
    "architectures": ["Qwen3DSparkModel"],
    "block_size": 7,
    "target_layer_ids": [1, 5, 9],
    "num_target_layers": 12,
    "mask_token_id": 499,
    "markov_rank": 8,
    "markov_head_type": "gated",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}
ZLAB = {
    **LAYERS,
    "architectures": ["DFlashDraftModel"],
    "block_size": 16,
    "num_target_layers": 36,
    "rope_theta": 1e6,
    "dflash_config": {"mask_token_id": 498, "target_layer_ids": [1, 9, 17, 25, 33]},
}
SPECULATORS = {
    "architectures": ["DSparkSpeculator"],
    "speculators_model_type": "dspark",
    "transformer_layer_config": {
        **LAYERS,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 2048,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    },
    "draft_vocab_size": 100,
    "block_size": 8,
    "aux_hidden_state_layer_ids": [2, 18, 33],
    "mask_token_id": 497,
    "markov_rank": 16,
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "sample_from_anchor": True,
}


def test_deepspec_counts_drafts() -> None:
    config = parse_config(DEEPSPEC)
    assert (config.kind, config.block_size, config.block_rows, config.sample_from_anchor) == ("dspark", 7, 7, True)
    assert config.target_layer_ids == (1, 5, 9)
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (32, 1e6, 1e-5)
    assert (config.markov_rank, config.markov_head_type) == (8, "gated")


def test_deepspec_without_heads_is_dflash() -> None:
    raw = {key: value for key, value in DEEPSPEC.items() if "markov" not in key} | {"enable_confidence_head": False}
    assert parse_config(raw).kind == "dflash"


def test_zlab_counts_the_anchor() -> None:
    config = parse_config(ZLAB)
    assert (config.kind, config.block_size, config.block_rows, config.sample_from_anchor) == ("dflash", 15, 16, False)
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert (config.mask_token_id, config.rope_theta) == (498, 1e6)


def test_speculators_shift_layer_ids_and_reduce_the_vocabulary() -> None:
    config = parse_config(SPECULATORS)
    assert (config.kind, config.block_size, config.block_rows) == ("dspark", 8, 8)
    assert config.target_layer_ids == (1, 17, 32)
    assert (config.vocab_size, config.draft_vocab_size, config.reduced) == (500, 100, True)
    assert (config.window(0), config.window(1), config.causal_sliding) == (2048, None, True)
    assert config.rope_theta == 5e5


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_speculators_without_the_field_do_not_draft_from_the_anchor(kind: str) -> None:
    raw = {key: value for key, value in SPECULATORS.items() if key != "sample_from_anchor"}
    config = parse_config(raw | {"speculators_model_type": kind})
    assert (config.kind, config.block_size, config.block_rows) == (kind, 7, 8)


def test_speculators_eagle3() -> None:
    layers = {**LAYERS, "model_type": "llama", "num_hidden_layers": 1}
    config = parse_config(
        {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layers,
            "eagle_aux_hidden_state_layer_ids": [2, 18, 33],
            "norm_before_residual": True,
            "speculators_config": {"proposal_methods": [{"speculative_tokens": 4}]},
        }
    )
    assert (config.kind, config.block_size, config.target_layer_ids) == ("eagle3", 4, (1, 17, 32))
    assert config.norm_before_residual
    assert not config.qk_norm


@pytest.mark.parametrize("raw", [DEEPSPEC, ZLAB, SPECULATORS], ids=["deepspec", "zlab", "speculators"])
def test_our_own_files_say_the_same(raw: dict[str, Any]) -> None:
    config = parse_config(raw)
    again = parse_config(json.loads(json.dumps(deepspec_json(config))))
    differing = {name for name in vars(config) if getattr(config, name) != getattr(again, name)}
    assert differing <= {"layer_types"}  # written out where it was implied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov_head_type": "lstm"}, "unknown head type 'lstm'"),
        ({"architectures": ["LlamaForCausalLM"]}, "unknown drafter class 'LlamaForCausalLM'"),
        ({"target_layer_ids": [1, 12]}, r"target_layer_ids \[12\] do not exist"),
        ({"target_layer_ids": [-2]}, r"target_layer_ids \[-2\] do not exist"),
        ({"target_layer_ids": []}, "target_layer_ids is empty"),
        ({"mask_token_id": 500}, "outside the vocabulary"),
        ({"mask_token_id": "x"}, "drafter config"),
        ({"block_size": 0}, "block_size is 0"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
        ({"num_attention_heads": 3}, "do not divide"),
        ({"markov_rank": 0}, "needs markov_rank"),
        ({"draft_vocab_size": 501}, "larger than the vocabulary"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "unknown rope type 'yarn'"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "need a sliding_window"),
        ({"layer_types": ["linear_attention"] * 2}, "unknown layer types"),
        ({"architectures": 5}, "drafter config"),
        ({"architectures": [["x"]]}, "drafter config"),
        ({"rope_parameters": "default"}, "drafter config"),
        ({"head_dim": None, "num_attention_heads": 0}, "drafter config"),
    ],
)
def test_unusable_configs_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        parse_config(DEEPSPEC | changes)


@pytest.mark.parametrize("key", ["block_size", "target_layer_ids", "hidden_size", "mask_token_id"])
def test_missing_settings_are_named(key: str) -> None:
    with pytest.raises(BadCheckpoint, match=f"{key} is missing"):
        parse_config({name: value for name, value in DEEPSPEC.items() if name != key})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        read_config(tmp_path)
