"""Writes a DSpark or DFlash drafter as a GGUF of architecture `dflash`, for this backend and for stock llama.cpp.

RoPE is NeoX style there, as in the checkpoints, so no row is permuted. Embedding and a full output head stay with the
target: libllama borrows them; only a reduced draft vocabulary brings its own head, and `d2t` with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_cli.backends.base import DsparkError, FloatArray, PairMismatch
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.backends.llamacpp.model import DRAFTER_ARCHITECTURE
from dspark_cli.backends.llamacpp.quants import HALF, QUANTS, Formats


@dataclass(frozen=True)
class DrafterSpec:
    """Shape of a drafter, in the words of the checkpoints.

    block_size:         drafts per round, the anchor not counted
    target_layers:      decoder layers whose outputs it reads (0-based; -1 = embeddings), in the order of `fc`'s columns
    sample_from_anchor: whether the anchor's own row predicts the first draft (DeepSpec) or is skipped (z-lab's DFlash)
    markov_rank:        0 = no Markov head (DFlash)
    draft_vocab:        rows of a reduced output head; None = the target's head
    """

    block_size: int
    target_layers: tuple[int, ...]
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    hidden: int
    ffn: int
    mask_token_id: int
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    sample_from_anchor: bool = True
    markov_rank: int = 0
    confidence: bool = False
    draft_vocab: int | None = None
    name: str = "drafter"


#: DeepSpec name -> (GGUF name, shape in the letters of `_sizes`). One row a tensor; `N` stands for the layer's number.
_TENSORS: dict[str, tuple[str, str]] = {
    "fc.weight": ("fc.weight", "d md"),
    "hidden_norm.weight": ("enc.output_norm.weight", "d"),
    "norm.weight": ("output_norm.weight", "d"),
}
_LAYER_TENSORS: dict[str, tuple[str, str]] = {
    "layers.N.input_layernorm.weight": ("blk.N.attn_norm.weight", "d"),
    "layers.N.self_attn.q_proj.weight": ("blk.N.attn_q.weight", "q d"),
    "layers.N.self_attn.k_proj.weight": ("blk.N.attn_k.weight", "kv d"),
    "layers.N.self_attn.v_proj.weight": ("blk.N.attn_v.weight", "kv d"),
    "layers.N.self_attn.o_proj.weight": ("blk.N.attn_output.weight", "d q"),
    "layers.N.self_attn.q_norm.weight": ("blk.N.attn_q_norm.weight", "hd"),
    "layers.N.self_attn.k_norm.weight": ("blk.N.attn_k_norm.weight", "hd"),
    "layers.N.post_attention_layernorm.weight": ("blk.N.ffn_norm.weight", "d"),
    "layers.N.mlp.gate_proj.weight": ("blk.N.ffn_gate.weight", "f d"),
    "layers.N.mlp.up_proj.weight": ("blk.N.ffn_up.weight", "f d"),
    "layers.N.mlp.down_proj.weight": ("blk.N.ffn_down.weight", "d f"),
}
_MARKOV_TENSORS: dict[str, tuple[str, str]] = {
    "markov_head.markov_w1.weight": ("markov_w1.weight", "V r"),
    "markov_head.markov_w2.weight": ("markov_w2.weight", "v r"),
}
_CONFIDENCE_TENSORS: dict[str, tuple[str, str]] = {
    "confidence_head.proj.weight": ("conf_proj.weight", "1 d+r"),
    "confidence_head.proj.bias": ("conf_proj.bias", "1"),
}
_VOCABULARY_TENSORS: dict[str, tuple[str, str]] = {"lm_head.weight": ("output.weight", "v d"), "d2t": ("d2t", "v")}

#: in checkpoints, but not in the file: copies of the target's, or derived
_LEFT_OUT = ("embed_tokens.weight", "lm_head.weight", "t2d", "rotary_emb.inv_freq")


def write_drafter_gguf(
    path: str | Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    spec: DrafterSpec,
    target_gguf: str | Path,
    *,
    formats: Formats = HALF,
) -> Path:
    """Write the drafter of `spec` to `path`, whole or not at all; returns the path.

    tensors: arrays under their DeepSpec names (no "model." in front); `d2t` int64 [draft_vocab]: absolute target ids.
    target_gguf: the target it was trained for; vocabulary, tokenizer and context length are copied from there.
    formats: how the matrices are stored.

    Raises DsparkError for tensors that are missing, unknown or of the wrong shape, PairMismatch for another target.
    """
    import gguf

    check_file(Path(target_gguf))
    target = stored_metadata(Path(target_gguf))
    n_vocab = _check_target(spec, target, Path(target_gguf).name)
    ready = _collect(tensors, spec, n_vocab)

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        writer = gguf.GGUFWriter(temporary, DRAFTER_ARCHITECTURE)
        _write_metadata(writer, spec, target, n_vocab, formats.layers)
        for name, data in ready.items():
            _write_tensor(writer, name, data, formats.of(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise DsparkError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class StoredValue:
    """A metadata value with what it takes to write it again."""

    content: Any
    types: tuple[Any, ...]


def stored_metadata(path: Path) -> dict[str, StoredValue]:
    """All metadata of a GGUF, vocabulary included (`header.read_header` is quick, and without). Raises DsparkError."""
    return _metadata(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # reading a vocabulary takes seconds; drafters for one target are often written in a row
def _metadata(path: Path, changed_ns: int) -> dict[str, StoredValue]:
    import gguf

    del changed_ns
    try:
        fields = gguf.GGUFReader(path).fields.values()
    except (ValueError, IndexError) as error:
        raise DsparkError(f"{path} cannot be read as GGUF: {error}") from None
    return {
        field.name: StoredValue(field.contents(), tuple(field.types))
        for field in fields
        if not field.name.startswith("GGUF.")
    }


def _value(metadata: Mapping[str, StoredValue], key: str) -> Any:
    return metadata[key].content if key in metadata else None


def _check_target(spec: DrafterSpec, target: Mapping[str, StoredValue], name: str) -> int:
    """Refuse a target the drafter cannot belong to; returns the size of its vocabulary."""
    arch = _value(target, "general.architecture")
    hidden, n_layer = _value(target, f"{arch}.embedding_length"), _value(target, f"{arch}.block_count")
    tokens = _value(target, "tokenizer.ggml.tokens")
    if hidden is None or n_layer is None or tokens is None:
        raise DsparkError(f"{name} lacks the metadata of a language model (architecture {arch!r})")
    if hidden != spec.hidden:
        raise PairMismatch(f"the drafter has hidden size {spec.hidden}, {name} has {hidden}")
    beyond = [layer for layer in spec.target_layers if not -1 <= layer < n_layer - 1]
    if beyond:
        raise PairMismatch(
            f"the drafter reads the output of layer {beyond[0]}, {name} has usable layers -1 to {n_layer - 2}"
        )
    n_vocab = len(tokens)
    if not 0 <= spec.mask_token_id < n_vocab:
        raise PairMismatch(f"the drafter's mask token is {spec.mask_token_id}, {name} has {n_vocab} tokens")
    return n_vocab


def _collect(tensors: Mapping[str, npt.NDArray[Any]], spec: DrafterSpec, n_vocab: int) -> dict[str, npt.NDArray[Any]]:
    """GGUF name -> array, checked for completeness and shape."""
    if spec.confidence and not spec.markov_rank:
        raise DsparkError("libllama runs a confidence head only beside a Markov head", hint="a torch drafter")
    tensors = _padded_confidence(tensors, spec)
    table = _table(spec)
    missing = [name for name in table if name not in tensors]
    unknown = [name for name in tensors if name not in table and name not in _LEFT_OUT]
    if missing or unknown:
        what = (
            f"lacks {', '.join(missing[:3])}" if missing else f"has {', '.join(unknown[:3])}, which libllama cannot run"
        )
        raise DsparkError(f"the drafter {what}")
    shapes = gguf_shapes(spec, n_vocab)
    ready = {}
    for source, (name, _) in table.items():
        if tensors[source].shape != shapes[name]:
            raise DsparkError(
                f"{source} has shape {tensors[source].shape}, the drafter's description says {shapes[name]}"
            )
        ready[name] = tensors[source]
    if "d2t" in ready:
        _check_d2t(ready["d2t"], n_vocab)
    return ready


def gguf_names(spec: DrafterSpec) -> dict[str, str]:
    """DeepSpec name -> GGUF name of every tensor that `spec` asks for."""
    return {ours: theirs for ours, (theirs, _) in _table(spec).items()}


def gguf_shapes(spec: DrafterSpec, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of every tensor that `spec` asks for, with a target of `n_vocab` tokens."""
    sizes = _sizes(spec, n_vocab)
    return {name: tuple(sizes[letter] for letter in letters.split()) for name, letters in _table(spec).values()}


def _table(spec: DrafterSpec) -> dict[str, tuple[str, str]]:
    """Every tensor that `spec` asks for."""
    table = dict(_TENSORS)
    for layer in range(spec.n_layer):
        for source, (name, letters) in _LAYER_TENSORS.items():
            table[source.replace("N", str(layer), 1)] = (name.replace("N", str(layer), 1), letters)
    if spec.markov_rank:
        table |= _MARKOV_TENSORS
    if spec.confidence:
        table |= _CONFIDENCE_TENSORS
    if spec.draft_vocab is not None:
        table |= _VOCABULARY_TENSORS
    return table


def _sizes(spec: DrafterSpec, n_vocab: int) -> dict[str, int]:
    return {
        "1": 1,
        "d": spec.hidden,
        "md": spec.hidden * len(spec.target_layers),
        "q": spec.n_head * spec.head_dim,
        "kv": spec.n_head_kv * spec.head_dim,
        "hd": spec.head_dim,
        "f": spec.ffn,
        "r": spec.markov_rank,
        "d+r": spec.hidden + spec.markov_rank,
        "V": n_vocab,
        "v": spec.draft_vocab or n_vocab,
    }


def _padded_confidence(tensors: Mapping[str, npt.NDArray[Any]], spec: DrafterSpec) -> dict[str, npt.NDArray[Any]]:
    """A confidence head that does not read the Markov embedding, as libllama wants it: zeros for that part."""
    name = "confidence_head.proj.weight"
    result = dict(tensors)
    if spec.confidence and name in result and result[name].shape == (1, spec.hidden):
        result[name] = np.pad(result[name], ((0, 0), (0, spec.markov_rank)))
    return result


def _check_d2t(d2t: npt.NDArray[Any], n_vocab: int) -> None:
    ids = d2t.astype(np.int64)
    if len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= n_vocab:
        raise DsparkError(f"d2t must hold different ids from 0 to {n_vocab - 1}, one for each draft token")


def _write_metadata(
    writer: Any, spec: DrafterSpec, target: Mapping[str, StoredValue], n_vocab: int, quant: str
) -> None:
    import gguf

    arch = _value(target, "general.architecture")
    writer.add_type("model")
    writer.add_name(spec.name)
    writer.add_file_type(QUANTS[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(_value(target, f"{arch}.context_length") or 4096)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.n_layer)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head_kv)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    # llama.cpp counts the rows of a block, the anchor's included, and the *inputs* of layers.
    writer.add_uint32(f"{DRAFTER_ARCHITECTURE}.block_size", spec.block_size + (0 if spec.sample_from_anchor else 1))
    writer.add_array(f"{DRAFTER_ARCHITECTURE}.target_layers", [layer + 1 for layer in spec.target_layers])
    writer.add_bool(f"{DRAFTER_ARCHITECTURE}.sample_from_anchor", spec.sample_from_anchor)
    writer.add_bool(f"{DRAFTER_ARCHITECTURE}.has_confidence_head", spec.confidence)
    for key, value in target.items():
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.mask_token_id":
            writer.add_key_value(key, value.content, value.types[0], *value.types[1:2])
    writer.add_uint32("tokenizer.ggml.mask_token_id", spec.mask_token_id)


def _write_tensor(writer: Any, name: str, data: npt.NDArray[Any], quant: str) -> None:
    import gguf

    if name == "d2t":
        writer.add_tensor(name, data.astype(np.int64), raw_dtype=gguf.GGMLQuantizationType.I64)
        return
    array: FloatArray = np.ascontiguousarray(data, dtype=np.float32)
    kind = _storage(array, quant) if array.ndim == 2 and min(array.shape) > 1 else "F32"
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)


def _storage(array: FloatArray, quant: str) -> str:
    """`quant`, or F16 where rows are not a whole number of its blocks."""
    import gguf

    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant]]
    return quant if array.shape[-1] % block == 0 else "F16"
