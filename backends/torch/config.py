"""What a drafter checkpoint says about itself, read once into one vocabulary.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_cli.backends.base import DsparkError

HEAD_TYPES = ("vanilla", "gated", "rnn")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "proportional")
LAYER_TYPES = ("full_attention", "sliding_attention")

DEEPSPEC_CLASSES = {
    "Qwen3DSparkModel": "dspark",
    "Gemma4DSparkModel": "dspark",
    "Qwen3Eagle3Model": "eagle3",
}
ZLAB_CLASSES = {"DFlashDraftModel": "dflash"}
SPECULATORS_KINDS = ("dspark", "dflash", "eagle3")

Json = Mapping[str, Any]


class BadCheckpoint(DsparkError):
    """A drafter checkpoint that cannot be used as it is."""


@dataclass(frozen=True)
class DrafterConfig:
    """Everything a drafter module is built from.

    kind:               dspark, dflash or eagle3
    family:             "qwen3" or "gemma4": how a block is wired (norms, attention scale, shared keys and values)
    hidden_size:        width of the drafter; target_hidden_size is the target's, which the features have
    vocab_size:         the target's vocabulary; draft_vocab_size rows of it have a logit (equal when not reduced)
    block_size:         tokens drafted per round, the anchor not among them (eagle3: steps)
    sample_from_anchor: the anchor's own row drafts the first token; otherwise that row is only context
    target_layer_ids:   0-based decoder layers whose outputs are the features; -1 = the embeddings
    num_target_layers:  layers of the target that the drafter was made for; None if the checkpoint does not say
    sliding_window:     keys a sliding layer sees; causal_sliding: it does not see later rows of its own block
    markov_rank:        0 = no sequential head
    softcap:            logits = softcap * tanh(logits / softcap) before the head's bias; None = off
    qk_norm:            RMSNorm on queries and keys, per head
    norm_before_residual: eagle3 of speculators: the residual is the normed hidden state
    """

    kind: str
    family: str
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int = 0
    sample_from_anchor: bool = True
    num_target_layers: int | None = None
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 4096
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    causal_sliding: bool = False
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    confidence_head: bool = False
    confidence_head_with_markov: bool = False
    embed_scale: float = 1.0
    softcap: float | None = None
    shared_key_value: bool = False
    qk_norm: bool = True
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        for complaint in _complaints(self):
            raise BadCheckpoint(f"drafter config: {complaint}")

    @property
    def gemma(self) -> bool:
        """Gemma4 wiring: sandwich norms, layer_scalar, attention scale 1, RMSNorm without weight on values."""
        return self.family == "gemma4"

    @property
    def reduced(self) -> bool:
        """Whether the drafter has logits for a part of the vocabulary only (then it has a d2t map)."""
        return self.draft_vocab_size != self.vocab_size

    @property
    def block_rows(self) -> int:
        """Rows of one block forward: the drafts, plus the anchor's row when that one does not draft."""
        return self.block_size if self.sample_from_anchor else self.block_size + 1

    @property
    def feature_width(self) -> int:
        """m*d of the features."""
        return len(self.target_layer_ids) * self.target_hidden_size

    def window(self, layer: int) -> int | None:
        """Sliding window of draft layer `layer`; None when it attends to everything."""
        sliding = bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


def _complaints(config: DrafterConfig) -> list[str]:
    """What makes `config` unusable, as sentences."""
    found = []
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "block_size")
    found += [f"{name} is {getattr(config, name)}, needs at least 1" for name in sizes if getattr(config, name) < 1]
    if config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads:
        found.append(f"{config.num_heads} query heads do not divide over {config.num_kv_heads} KV heads")
    if config.markov_head_type not in HEAD_TYPES:
        found.append(f"unknown head type {config.markov_head_type!r} (known: {', '.join(HEAD_TYPES)})")
    if config.activation not in ACTIVATIONS:
        found.append(f"unknown activation {config.activation!r} (known: {', '.join(ACTIVATIONS)})")
    if config.rope_type not in ROPE_TYPES:
        found.append(f"unknown rope type {config.rope_type!r} (known: {', '.join(ROPE_TYPES)})")
    if unknown := set(config.layer_types) - set(LAYER_TYPES):
        found.append(f"unknown layer types {sorted(unknown)} (known: {', '.join(LAYER_TYPES)})")
    if config.layer_types and len(config.layer_types) != config.num_layers:
        found.append(f"{len(config.layer_types)} layer_types for {config.num_layers} layers")
    if "sliding_attention" in config.layer_types and (config.gemma or not config.sliding_window):
        found.append("sliding layers need a sliding_window, and a Qwen3-style block")
    if config.confidence_head_with_markov and not config.markov_rank:
        found.append("confidence_head_with_markov needs markov_rank > 0")
    if config.draft_vocab_size > config.vocab_size:
        found.append(f"draft vocabulary {config.draft_vocab_size} is larger than the vocabulary {config.vocab_size}")
    if not 0 <= config.mask_token_id < config.vocab_size:
        found.append(f"mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size}")
    return found + _layer_complaints(config.target_layer_ids, config.num_target_layers)


def _layer_complaints(layers: tuple[int, ...], n_layer: int | None) -> list[str]:
    if not layers:
        return ["target_layer_ids is empty"]
    beyond = [i for i in layers if i < -1 or (n_layer is not None and i >= n_layer)]
    if not beyond:
        return []
    return [f"target_layer_ids {beyond} do not exist (-1 .. {'last' if n_layer is None else n_layer - 1})"]


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
    architecture = (raw.get("architectures") or ["(none)"])[0]
    try:
        if "transformer_layer_config" in raw:
            return _from_speculators(raw)
        if architecture in DEEPSPEC_CLASSES:
            return _from_deepspec(raw, DEEPSPEC_CLASSES[architecture])
        if architecture in ZLAB_CLASSES:
            return _from_zlab(raw, ZLAB_CLASSES[architecture])
    except KeyError as error:
        raise BadCheckpoint(f"drafter config: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
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
    fields = _block_fields(raw) | {
        "embed_scale": float(extra.get("input_embedding_scale", 1.0)),
        "softcap": extra.get("final_logit_softcapping"),
        # z-lab's sliding layers are causal unless the config says otherwise
        "causal_sliding": extra.get("is_causal") is not False,
    }
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
        "embed_scale": math.sqrt(hidden) if gemma else 1.0,
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
