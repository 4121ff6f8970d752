"""The dialects of a drafter's config.json, converted once, at load.

Three dialects of config.json exist. They differ in things that shift every draft by one token when missed:

| dialect     | block_size counts              | target layer ids              | d2t in the weights |
|-------------|--------------------------------|-------------------------------|--------------------|
| DeepSpec    | drafts (the anchor's row too)  | 0-based decoder layers        | offsets            |
| z-lab       | the anchor: b16 drafts 15      | 0-based decoder layers        | (none)             |
| speculators | as `sample_from_anchor` says   | hidden_states index, one more | offsets            |

In memory `block_size` is drafts only, layer ids are 0-based decoder layers (-1 = embeddings), d2t holds absolute ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_cli.backends.torch.config import BadCheckpoint, DrafterConfig

Json = Mapping[str, Any]

DEEPSPEC_CLASSES = {
    "Qwen3DSparkModel": "dspark",
    "Gemma4DSparkModel": "dspark",
    "Qwen3Eagle3Model": "eagle3",
    "Gemma4Eagle3Model": "eagle3",
}
ZLAB_CLASSES = {"DFlashDraftModel": "dflash"}
SPECULATORS_KINDS = ("dspark", "dflash", "eagle3")


def read_config(folder: Path) -> DrafterConfig:
    """The `DrafterConfig` of a checkpoint folder."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{folder} has no config.json", hint="a drafter is a folder with config.json") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None
    return parse_config(raw)


def parse_config(raw: Json) -> DrafterConfig:
    """Convert config.json of any known dialect. Raises BadCheckpoint for what no dialect explains."""
    if not isinstance(raw, Mapping):
        raise BadCheckpoint("drafter config: config.json is not an object")
    try:
        architecture = (raw.get("architectures") or ["(none)"])[0]
        if "transformer_layer_config" in raw:
            return _from_speculators(raw)
        if architecture in DEEPSPEC_CLASSES:
            return _from_deepspec(raw, DEEPSPEC_CLASSES[architecture])
        if architecture in ZLAB_CLASSES:
            return _from_zlab(raw, ZLAB_CLASSES[architecture])
    except KeyError as error:
        raise BadCheckpoint(f"drafter config: {error.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadCheckpoint(f"drafter config: {error}") from None
    known = ", ".join([*DEEPSPEC_CLASSES, *ZLAB_CLASSES, *(f"speculators {kind}" for kind in SPECULATORS_KINDS)])
    raise BadCheckpoint(f"unknown drafter class {architecture!r} (known: {known})")


def _from_deepspec(raw: Json, kind: str) -> DrafterConfig:
    sample_from_anchor = bool(raw.get("sample_from_anchor", True))
    if kind == "eagle3":
        return DrafterConfig(
            kind=kind,
            block_size=raw["ttt_length"],
            target_layer_ids=tuple(raw["target_layer_ids"]),
            norm_before_residual=bool(raw.get("norm_before_residual", False)),
            **_block_fields(raw),
        )
    rank = raw.get("markov_rank") or 0
    return DrafterConfig(
        kind="dspark" if rank or raw.get("enable_confidence_head") else "dflash",
        block_size=raw["block_size"] - (not sample_from_anchor),
        sample_from_anchor=sample_from_anchor,
        target_layer_ids=tuple(raw["target_layer_ids"]),
        mask_token_id=raw["mask_token_id"],
        **_head_fields(raw),
        **_block_fields(raw),
    )


def _from_zlab(raw: Json, kind: str) -> DrafterConfig:
    """z-lab's DFlash: the block holds the anchor, whose row drafts nothing."""
    extra = {**raw, **(raw.get("dflash_config") or {})}
    if extra.get("output_multiplier", 1.0) != 1.0:
        raise BadCheckpoint("drafter config: output_multiplier is not supported")
    fields = _block_fields(extra)
    if extra.get("is_causal") and set(fields["layer_types"]) != {"sliding_attention"}:
        raise BadCheckpoint("drafter config: causal blocks are supported in sliding layers only")
    fields["causal_sliding"] = extra.get("is_causal") is not False  # causal sliding layers unless the config objects
    sample_from_anchor = bool(extra.get("sample_from_anchor", False))
    return DrafterConfig(
        kind=kind,
        block_size=extra["block_size"] - (not sample_from_anchor),
        sample_from_anchor=sample_from_anchor,
        target_layer_ids=tuple(extra["target_layer_ids"]),
        mask_token_id=extra["mask_token_id"],
        **fields,
    )


def _from_speculators(raw: Json) -> DrafterConfig:
    """speculators: the block is described in a nested config, layer ids count the embeddings as 0."""
    kind = raw.get("speculators_model_type")
    if kind not in SPECULATORS_KINDS:
        raise BadCheckpoint(f"unknown speculators model {kind!r} (known: {', '.join(SPECULATORS_KINDS)})")
    fields = _block_fields(raw["transformer_layer_config"])
    fields["draft_vocab_size"] = raw.get("draft_vocab_size") or fields["vocab_size"]
    fields["target_hidden_size"] = raw.get("target_hidden_size") or fields["hidden_size"]
    fields["num_target_layers"] = None  # the nested config counts the drafter's own layers
    fields["causal_sliding"] = not raw.get("sliding_window_non_causal", False)
    if kind == "eagle3":
        if raw.get("norm_before_fc"):
            raise BadCheckpoint("drafter config: norm_before_fc is not supported")
        layers = raw["eagle_aux_hidden_state_layer_ids"]
        fields["norm_before_residual"] = bool(raw.get("norm_before_residual", False))
        return DrafterConfig(
            kind=kind, block_size=_speculative_tokens(raw), target_layer_ids=tuple(i - 1 for i in layers), **fields
        )
    sample_from_anchor = bool(raw.get("sample_from_anchor", False))
    if raw.get("projector_type", "dflash") != "dflash":
        raise BadCheckpoint(f"drafter config: projector_type {raw['projector_type']!r} is not supported")
    return DrafterConfig(
        kind=kind,
        block_size=raw["block_size"] - (not sample_from_anchor),
        sample_from_anchor=sample_from_anchor,
        target_layer_ids=tuple(i - 1 for i in raw["aux_hidden_state_layer_ids"]),
        mask_token_id=raw["mask_token_id"],
        **(_head_fields(raw) if kind == "dspark" else {}),
        **fields,
    )


def _speculative_tokens(raw: Json) -> int:
    """Steps that a speculators checkpoint proposes by default."""
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return int(methods[0].get("speculative_tokens", 5))


def _head_fields(raw: Json) -> dict[str, Any]:
    rank = int(raw.get("markov_rank") or 0)
    confidence = bool(raw.get("enable_confidence_head", False))
    return {
        "markov_rank": rank,
        "markov_head_type": raw.get("markov_head_type") or "vanilla",
        "confidence_head": confidence,
        "confidence_head_with_markov": confidence and bool(raw.get("confidence_head_with_markov", False)),
    }


def _block_fields(raw: Json) -> dict[str, Any]:
    """Fields of the transformer blocks, from a transformers-style config."""
    model_type = str(raw.get("model_type", "qwen3"))
    gemma = model_type.startswith("gemma4")
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    layer_types = raw.get("layer_types") or ()
    shared = gemma and bool(raw.get("attention_k_eq_v"))
    kv_heads = raw["num_global_key_value_heads"] if shared else raw.get("num_key_value_heads") or heads
    head_dim = raw.get("global_head_dim") if gemma else None
    return {
        "family": "gemma4" if gemma else "qwen3",
        "hidden_size": hidden,
        "target_hidden_size": raw.get("target_hidden_size") or hidden,
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim or raw.get("head_dim") or hidden // heads,
        "vocab_size": raw["vocab_size"],
        "draft_vocab_size": raw.get("draft_vocab_size") or raw["vocab_size"],
        "num_target_layers": raw.get("num_target_layers"),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "activation": raw.get("hidden_activation") or raw.get("hidden_act") or "silu",
        "attention_bias": bool(raw.get("attention_bias", False)),
        "max_position_embeddings": raw.get("max_position_embeddings", 4096),
        "layer_types": tuple(layer_types),
        "sliding_window": raw.get("sliding_window"),
        "causal_sliding": bool(raw.get("causal_sliding", False)),
        "embed_scale": math.sqrt(hidden) if gemma else float(raw.get("input_embedding_scale", 1.0)),
        "softcap": raw.get("final_logit_softcapping"),
        "shared_key_value": shared,
        "qk_norm": gemma or model_type.startswith("qwen3"),
        **_rope_fields(raw),
    }


def _rope_fields(raw: Json) -> dict[str, Any]:
    """RoPE: `rope_parameters` (flat, or one entry per layer type), else `rope_theta` with `rope_scaling`."""
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope
    scaling = raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    return {
        "rope_theta": float(theta),
        "rope_type": rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default",
        "partial_rotary_factor": float(rope.get("partial_rotary_factor") or 1.0),
    }
