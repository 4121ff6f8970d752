"""Write a drafter in DeepSpec's checkpoint format (config.json and model.safetensors), with our two additions.

`sample_from_anchor` and `draft_vocab_size` are written only when they differ from what DeepSpec means without them;
`d2t` holds offsets (target id - draft id), as in every published checkpoint that has one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3


def save_drafter(
    model: DSpark | Eagle3, folder: Path, *, dtype: torch.dtype = torch.float32, without: Collection[str] = ()
) -> None:
    """Write `model` to `folder`. Each file appears whole or not at all. Raises DsparkError when the disk refuses.

    without: keys to leave out ("embed_tokens.weight", "lm_head.weight"): the loader borrows them from the target.
    """
    weights = {key: value.detach().cpu() for key, value in model.state_dict().items() if key not in without}
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    if "d2t" in weights:
        weights["d2t"] = weights["d2t"] - torch.arange(len(weights["d2t"]))
    tied = weights.get("lm_head.weight")
    if tied is not None and tied.data_ptr() == weights.get("embed_tokens.weight", tied[:0]).data_ptr():
        weights["lm_head.weight"] = tied.clone()  # the format knows no shared memory, and published drafters hold both
    text = json.dumps(deepspec_json(model.config, dtype), indent=2, sort_keys=True)
    partial = folder / "model.safetensors.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in weights.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, folder / "model.safetensors")
        partial = folder / "config.json.part"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, folder / "config.json")
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DsparkError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def deepspec_json(config: DrafterConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """config.json of `config` in DeepSpec's dialect; `parse_config` gives the same config back."""
    family = "Gemma4" if config.gemma else "Qwen3"
    written: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "target_layer_ids": list(config.target_layer_ids),
        **_block_json(config),
        **(_gemma_json(config) if config.gemma else _qwen_json(config)),
    }
    if config.kind == "eagle3":
        written |= {"architectures": [f"{family}Eagle3Model"], "ttt_length": config.block_size}
        if config.norm_before_residual:
            written["norm_before_residual"] = True
    else:
        written |= {"block_size": config.block_rows, "mask_token_id": config.mask_token_id, **_head_json(config)}
        written["architectures"] = [f"{family}DSparkModel"]
        if not config.sample_from_anchor:
            written["sample_from_anchor"] = False
    for key, value, usual in (
        ("num_target_layers", config.num_target_layers, None),
        ("draft_vocab_size", config.draft_vocab_size, config.vocab_size),
        ("target_hidden_size", config.target_hidden_size, config.hidden_size),
        ("final_logit_softcapping", config.softcap, None),
    ):
        if value != usual:
            written[key] = value
    return written


def _block_json(config: DrafterConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_types": list(config.layer_types or ["full_attention"] * config.num_layers),
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
    }


def _qwen_json(config: DrafterConfig) -> dict[str, Any]:
    written: dict[str, Any] = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_act": config.activation,
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_kv_heads,
        "rope_parameters": _rope_json(config),
    }
    if config.embed_scale != 1.0:
        written["input_embedding_scale"] = config.embed_scale
    if config.causal_sliding:
        written["causal_sliding"] = True
    return written


def _gemma_json(config: DrafterConfig) -> dict[str, Any]:
    kv = "num_global_key_value_heads" if config.shared_key_value else "num_key_value_heads"
    return {
        "model_type": "gemma4_unified_text",
        "hidden_activation": config.activation,
        "global_head_dim": config.head_dim,
        kv: config.num_kv_heads,
        "attention_k_eq_v": config.shared_key_value,
        "rope_parameters": {"full_attention": _rope_json(config)},
    }


def _rope_json(config: DrafterConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": config.rope_type}
    return rope | (
        {} if config.partial_rotary_factor == 1.0 else {"partial_rotary_factor": config.partial_rotary_factor}
    )


def _head_json(config: DrafterConfig) -> dict[str, Any]:
    written: dict[str, Any] = {"markov_rank": config.markov_rank, "enable_confidence_head": config.confidence_head}
    if config.markov_rank:
        written["markov_head_type"] = config.markov_head_type
    if config.confidence_head:
        written["confidence_head_with_markov"] = config.confidence_head_with_markov
    return written
