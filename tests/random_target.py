"""A target of any size with random weights, to measure what passes cost: that does not hang on what the weights say.

    python tests/random_target.py FILE.gguf [--hidden 2048] [--ffn 5632] [--layers 16] [--heads 32] [--kv-heads 8]

Llama's architecture in F16, with the tokenizer of the embedded target; embedding and head are one matrix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

from synthetic import N_VOCAB, target_path


def write_target(path: Path, *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, ctx: int = 8192) -> Path:
    """Raises OSError. Takes about 2 bytes of disk a weight, and memory for one matrix."""
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    head = hidden // heads
    writer.add_name("random")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(ctx)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    for name, kept in gguf.GGUFReader(target_path()).fields.items():
        if name.startswith("tokenizer."):
            kind = kept.types[0]
            of = kept.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, kept.contents(), kind, sub_type=of)
    matrices = {"token_embd": (N_VOCAB, hidden)}
    vectors = ["output_norm"]
    for i in range(layers):
        begin = f"blk.{i}."
        matrices |= {
            begin + "attn_q": (hidden, hidden),
            begin + "attn_k": (kv_heads * head, hidden),
            begin + "attn_v": (kv_heads * head, hidden),
            begin + "attn_output": (hidden, hidden),
            begin + "ffn_gate": (ffn, hidden),
            begin + "ffn_up": (ffn, hidden),
            begin + "ffn_down": (hidden, ffn),
        }
        vectors += [begin + "attn_norm", begin + "ffn_norm"]
    random = np.random.default_rng(0)
    for name, shape in matrices.items():
        weights = random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
        writer.add_tensor(name + ".weight", weights.astype(np.float16))
    for name in vectors:
        writer.add_tensor(name + ".weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name, default in (("hidden", 2048), ("ffn", 5632), ("layers", 16), ("heads", 32), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("hidden", "ffn", "layers", "heads", "kv_heads")}
    print(write_target(options.file, **sizes))


if __name__ == "__main__":
    main()
