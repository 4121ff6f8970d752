"""What the memory plan must know, read from files that are here: GGUF headers, config.json. Nothing is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.backends.llamacpp.attention import FEW_SEQUENCES, few_sequences
from dspark_cli.backends.llamacpp.quants import FILE_TYPES
from dspark_cli.backends.pairing import TargetFacts, gguf_target
from dspark_cli.registry.plan import DrafterSize, TargetSize
from dspark_cli.registry.quants import parts_of


def target_size(path: Path) -> TargetSize:
    """Of a GGUF file (the first part of a split one) or a checkpoint folder. Raises DsparkError when unreadable."""
    return _checkpoint_size(path) if path.is_dir() else _gguf_size(path)


def as_computed(target: TargetSize, folder: Path, kind: str) -> tuple[TargetSize, str]:
    """A checkpoint's size in the dtype it is computed in on a device of this kind, and the word for that dtype's KV.

    A CPU without bfloat16 instructions computes in float32, which takes twice the bytes of the files.
    """
    from dspark_cli.backends.torch.devices import detect, dtype_for, pick
    from dspark_cli.backends.torch.folder import stored_dtype

    stored = stored_dtype(folder)
    dtype = dtype_for(stored, pick(kind, detect()), str(_config(folder).get("model_type") or ""))
    grows = (4 if dtype == "float32" else 2) / (4 if stored == "float32" else 2)
    words = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return replace(target, weights=int(target.weights * grows)), words[dtype]


def target_facts(path: Path) -> TargetFacts:
    """What the check of a pair must know of a target, GGUF or checkpoint folder."""
    if not path.is_dir():
        from dspark_cli.backends.llamacpp.header import read_header

        return gguf_target(read_header(path), path.name)
    raw, size = _config(path), _checkpoint_size(path)
    rope = raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta") or rope.get("rope_theta") or (rope.get("full_attention") or {}).get("rope_theta")
    return TargetFacts(
        name=path.name,
        n_vocab=size.n_vocab,
        n_embd=size.n_embd,
        n_layer=size.n_layer,
        last_layer=size.n_layer - 1,
        rope_theta=theta,
        has_template=_has_template(path),
    )


def _has_template(folder: Path) -> bool:
    """Whether the tokenizer of a checkpoint has a chat template: a file of its own, or a key of its configuration."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def drafter_size(path: Path, target: TargetSize) -> DrafterSize:
    """Of a drafter GGUF, a small model's GGUF, or a drafter's checkpoint folder."""
    if path.is_dir():
        return _checkpoint_drafter(path, target)
    from dspark_cli.backends.llamacpp.header import read_header

    header = read_header(check_file(path))
    if header.architecture != "dflash":
        small = _gguf_size(path)
        return DrafterSize(
            "small",
            weights=small.weights,
            n_layer=small.n_layer,
            n_embd=small.n_embd,
            n_vocab=small.n_vocab,
            kv_values=small.kv_values,
            n_ff=small.n_ff,
            n_head=small.n_head,
        )
    own = _gguf_size(path)
    markov = "markov_w1.weight" in header.tensors
    layers = header.of_model("target_layers", [])
    return DrafterSize(
        kind="dspark" if markov else "dflash",
        weights=own.weights,
        n_layer=own.n_layer,
        n_embd=own.n_embd,
        n_vocab=target.n_vocab,
        kv_values=own.kv_values,
        n_ff=own.n_ff,
        block_size=int(header.of_model("block_size", 16)),
        features=len(layers) * target.n_embd,
        n_head=own.n_head,
    )


def _gguf_size(path: Path) -> TargetSize:
    from dspark_cli.backends.llamacpp.header import read_header

    header = read_header(check_file(path))
    layers = _number(header.of_model("block_count"), f"{path.name} says nothing about its layers")
    n_embd = _number(header.of_model("embedding_length"), f"{path.name} says nothing about its width")
    heads = _per_layer(header.of_model("attention.head_count"), layers, 1)
    kv_heads = _per_layer(header.of_model("attention.head_count_kv"), layers, max(heads))
    key = header.of_model("attention.key_length") or n_embd // max(1, *heads)
    value = header.of_model("attention.value_length") or key
    embedding = header.tensors.get("token_embd.weight")
    vocabulary = header.counts.get("tokenizer.ggml.tokens") or (embedding.shape[0] if embedding else 0)
    return TargetSize(
        weights=sum((path.parent / part).stat().st_size for part in parts_of(path.name)),
        n_layer=layers,
        n_embd=n_embd,
        n_vocab=vocabulary,
        kv_values=sum(kv_heads) * (int(key) + int(value)),
        n_ff=max(_per_layer(header.of_model("feed_forward_length"), layers, 4 * n_embd)),
        n_ctx_train=int(header.of_model("context_length") or 4096),
        n_head=max(heads),
        few_sequences=few_sequences(FILE_TYPES.get(header.metadata.get("general.file_type", -1), "")),
    )


def _number(value: Any, complaint: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise DsparkError(complaint)
    return value


def _per_layer(value: Any, layers: int, default: int) -> list[int]:
    if isinstance(value, list) and value:
        return [int(item) for item in value]
    return [int(value) if value else default] * layers


def _config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DsparkError(f"{folder}/config.json cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise DsparkError(f"{folder}/config.json is not a JSON object")
    nested = raw.get("text_config") or raw.get("transformer_layer_config")
    return {**raw, **nested} if isinstance(nested, dict) else raw


def _checkpoint_size(folder: Path) -> TargetSize:
    raw = _config(folder)
    layers = _number(raw.get("num_hidden_layers"), f"{folder}/config.json has no num_hidden_layers")
    n_embd = _number(raw.get("hidden_size"), f"{folder}/config.json has no hidden_size")
    heads = int(raw.get("num_attention_heads") or 1)
    head_dim = int(raw.get("head_dim") or n_embd // heads)
    return TargetSize(
        weights=_weight_bytes(folder),
        n_layer=layers,
        n_embd=n_embd,
        n_vocab=int(raw.get("vocab_size") or 0),
        kv_values=2 * layers * int(raw.get("num_key_value_heads") or heads) * head_dim,
        n_ff=int(raw.get("intermediate_size") or 4 * n_embd),
        n_ctx_train=int(raw.get("max_position_embeddings") or 4096),
        n_head=heads,
        few_sequences=FEW_SEQUENCES,
    )


def _checkpoint_drafter(folder: Path, target: TargetSize) -> DrafterSize:
    raw, own = _config(folder), _checkpoint_size(folder)
    layers = raw.get("target_layer_ids") or raw.get("aux_hidden_state_layer_ids") or [0, 1, 2]
    kind = "eagle3" if "eagle" in json.dumps(raw.get("architectures") or "").lower() else "dspark"
    return DrafterSize(
        kind=kind,
        weights=own.weights,
        n_layer=own.n_layer,
        n_embd=own.n_embd,
        n_vocab=int(raw.get("draft_vocab_size") or target.n_vocab),
        kv_values=own.kv_values,
        n_ff=own.n_ff,
        block_size=int(raw.get("block_size") or raw.get("ttt_length") or 8),
        features=len(layers) * target.n_embd,
    )


def through_torch(drafter: DrafterSize, folder: Path, target: TargetSize) -> DrafterSize:
    """A checkpoint that torch runs on the CPU beside a GGUF target: in float32 at most, with the target's two tables."""
    raw = _config(folder)
    stored = 4 if str(raw.get("dtype") or raw.get("torch_dtype") or "float32").endswith("float32") else 2
    tables = 2 * 4 * target.n_vocab * target.n_embd
    return replace(drafter, weights=drafter.weights * 4 // stored + tables)


def _weight_bytes(folder: Path) -> int:
    # "consolidated" is the same weights once more, in their makers' own layout
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")]
    return sum(path.stat().st_size for path in files)
