"""A tiny random target as a GGUF file that llama.cpp runs, with the embedded model's tokenizer: for tests that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import synthetic

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 64, 4, 2, 1, 96
EPS = 1e-5


def write_tiny_target(path: Path, *, seed: int = 0) -> Path:
    """A llama of 4 layers and width 64; its embedding is its head, so it repeats tokens a little and stays varied."""
    import gguf

    from dspark_cli.backends.llamacpp.export import stored_metadata

    source = synthetic.target_path()
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(synthetic.N_VOCAB)
    writer.add_file_type(0)
    for key, value in stored_metadata(source).items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, value.content, value.types[0], *value.types[1:2])

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (generator.normal(size=(rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    writer.add_tensor("token_embd.weight", matrix(synthetic.N_VOCAB, HIDDEN, 8.0))
    writer.add_tensor("output_norm.weight", (1 + 0.1 * generator.normal(size=HIDDEN)).astype(np.float32))
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FFN, HIDDEN),
            ("ffn_up", FFN, HIDDEN),
            ("ffn_down", HIDDEN, FFN),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix(rows, columns))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", (1 + 0.1 * generator.normal(size=HIDDEN)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
