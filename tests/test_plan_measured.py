"""The memory plan against what really is allocated: peak RSS of a process that loads and uses a pair on the CPU.

Stated error: 10 % for the embedded pair and for pairs of other shapes. GPUs are planned by the same parts, with the whole
compute buffer instead of the touched one; that could not be measured where this was written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import synthetic
from dspark_cli.backends.errors import DsparkError
from dspark_cli.registry import resolve
from dspark_cli.registry.plan import GIB, Device, PlanOptions, make_plan
from dspark_cli.registry.sizes import drafter_size, target_size

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak RSS is read from /proc")
ERROR = 0.10
WIDE = replace(synthetic.SPEC, draft_vocab=8192, n_layer=3, ffn=1536, n_head=9, n_head_kv=3, head_dim=64)


def measure(target: Path, ctx: int, drafter: Path | None = None) -> dict[str, Any]:
    script = Path(__file__).with_name("measure_memory.py")
    command = [sys.executable, str(script), str(target), str(ctx), *([str(drafter)] if drafter else [])]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def check(facts: dict[str, Any]) -> None:
    ratio = facts["planned"] / facts["grown"]
    assert 1 - ERROR <= ratio <= 1 + ERROR, f"planned {ratio:.1%} of {facts['grown']} bytes: {facts['plan']}"


@pytest.mark.parametrize("ctx", [1024, 3072])
def test_the_embedded_target(embedded_gguf: Path, ctx: int) -> None:
    check(measure(embedded_gguf, ctx))


def test_the_embedded_pair(embedded_gguf: Path, tmp_path: Path) -> None:
    """With the drafter that ships, or one of its shape where none does yet."""
    drafter = resolve("smollm2-135m").drafter_path
    if drafter is None:
        drafter = synthetic.write(tmp_path, synthetic.random_tensors(WIDE), WIDE, quant="Q8_0")
    check(measure(embedded_gguf, 2048, drafter))


def test_a_drafter_with_the_full_vocabulary(embedded_gguf: Path, tmp_path: Path) -> None:
    drafter = synthetic.write(tmp_path, synthetic.random_tensors(), quant="F16")
    check(measure(embedded_gguf, 1024, drafter))


def test_a_small_model_as_drafter(embedded_gguf: Path, tmp_path: Path) -> None:
    """A llama of another width and depth, of the same vocabulary, drafting for the embedded target and being one itself."""
    small = write_llama(tmp_path / "small.gguf", embedded_gguf, n_embd=256, n_layer=4, n_ff=512, n_head=4, n_head_kv=2)
    check(measure(small, 4096))
    check(measure(embedded_gguf, 1024, small))


def test_a_checkpoint_through_torch(tmp_path: Path) -> None:
    """A llama of 112M random weights in bfloat16, computed on the CPU."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("dspark_cli.backends.torch.target", reason="this version opens no checkpoint as a target")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tiny

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    check(measure(tmp_path, 1024))


def write_llama(
    path: Path, vocabulary_of: Path, *, n_embd: int, n_layer: int, n_ff: int, n_head: int, n_head_kv: int
) -> Path:
    """A llama GGUF of random F16 weights with the tokenizer of another file."""
    import gguf

    source = gguf.GGUFReader(vocabulary_of)
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if field.name.startswith("tokenizer."):
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
    n_vocab = len(source.fields["tokenizer.ggml.tokens"].contents())
    writer.add_context_length(8192)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(n_vocab)
    random = np.random.default_rng(0)
    kv = n_embd // n_head * n_head_kv

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        else:
            writer.add_tensor(name, (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float16))

    add("token_embd.weight", n_vocab, n_embd)
    add("output_norm.weight", n_embd)
    for i in range(n_layer):
        add(f"blk.{i}.attn_norm.weight", n_embd)
        add(f"blk.{i}.ffn_norm.weight", n_embd)
        for name, rows, columns in (
            *(
                ("attn_q", n_embd, n_embd),
                ("attn_k", kv, n_embd),
                ("attn_v", kv, n_embd),
                ("attn_output", n_embd, n_embd),
            ),
            *(("ffn_gate", n_ff, n_embd), ("ffn_up", n_ff, n_embd), ("ffn_down", n_embd, n_ff)),
        ):
            add(f"blk.{i}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sizes_are_read_from_the_files(embedded_gguf: Path, tmp_path: Path) -> None:
    target = target_size(embedded_gguf)
    assert (target.n_layer, target.n_embd, target.n_vocab, target.n_ff) == (30, 576, 49152, 1536)
    assert target.kv_values == 30 * 2 * 3 * 64
    assert target.weights == embedded_gguf.stat().st_size
    drafter = drafter_size(synthetic.write(tmp_path, synthetic.random_tensors(WIDE), WIDE, quant="Q8_0"), target)
    assert (drafter.kind, drafter.n_layer, drafter.block_size, drafter.features) == ("dspark", 3, 5, 3 * 576)
    assert drafter.kv_values == 3 * 2 * 3 * 64


def test_a_checkpoint_folder(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100, "intermediate_size": 256}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 5000)
    found = target_size(tmp_path)
    assert (found.weights, found.kv_values, found.n_vocab) == (5000, 2 * 3 * 2 * 16, 100)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DsparkError, match="not a JSON object"):
        target_size(tmp_path)


def test_kv_is_what_libllama_says(embedded_gguf: Path) -> None:
    """libllama prints 45.00 MiB for 2048 tokens of this model in f16."""
    device = Device("cpu", "cpu", 16 * GIB, 16 * GIB)
    plan = make_plan(device, "llamacpp", target_size(embedded_gguf), None, PlanOptions(ctx=2048))
    assert plan.target.kv == 45 * 2**20
