"""One tiny random Llama, written twice: as a checkpoint folder for transformers and as a GGUF for llama.cpp.

Same weights, same vocabulary (every byte, one merge, three control tokens), same chat template: what differs between two
passes over them is the backend.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dspark_cli.backends.torch.checkpoint import build  # noqa: E402
from dspark_cli.backends.torch.config import DrafterConfig  # noqa: E402
from dspark_cli.backends.torch.export import save_drafter  # noqa: E402

N_LAYER, HIDDEN, HEADS, KV_HEADS, FFN, N_CTX = 5, 64, 4, 2, 96, 512
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def alphabet() -> list[str]:
    """GPT-2's letters in the order of its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(rest)))]


TOKENS = [*alphabet(), "ĠĠ", *CONTROL]
N_VOCAB = len(TOKENS)
END = TOKENS.index("<|im_end|>")

DRAFTER = DrafterConfig(
    kind="dspark",
    family="qwen3",
    hidden_size=HIDDEN,
    target_hidden_size=HIDDEN,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=N_VOCAB,
    draft_vocab_size=N_VOCAB,
    block_size=4,
    target_layer_ids=(0, 2, 3),
    num_target_layers=N_LAYER,
    mask_token_id=0,
    markov_rank=8,
    confidence_head=True,
    confidence_head_with_markov=True,
)
EAGLE = replace(
    DRAFTER,
    kind="eagle3",
    num_layers=1,
    markov_rank=0,
    confidence_head=False,
    confidence_head_with_markov=False,
)


def tiny_config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": N_CTX,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": None,
    }
    return transformers.LlamaConfig(**settings | changes)


def tiny_model(config: Any = None, seed: int = 0) -> Any:
    """Random weights that are far from one another: greedy choices have margins well above rounding."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    1 + 0.1 * torch.randn_like(parameter) if "norm" in name else torch.randn_like(parameter)
                )
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(TOKENS) if token not in CONTROL}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def tiny_checkpoint(folder: Path, model: Any = None, **tokenizer: Any) -> Path:
    """The model as `save_pretrained` writes it."""
    (model or tiny_model()).save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return folder


def tiny_gguf(path: Path, model: Any = None) -> Path:
    """The same model in the words of GGUF; query and key rows in llama.cpp's order."""
    import gguf

    weights = {name: tensor.numpy() for name, tensor in (model or tiny_model()).state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    control = [gguf.TokenType.CONTROL if token in CONTROL else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(control)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in weights.items():
        writer.add_tensor(gguf_name(name), interleaved(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """GGUF's name of a Llama weight."""
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    parts = {
        "self_attn.q_proj.weight": "attn_q",
        "self_attn.k_proj.weight": "attn_k",
        "self_attn.v_proj.weight": "attn_v",
        "self_attn.o_proj.weight": "attn_output",
        "mlp.gate_proj.weight": "ffn_gate",
        "mlp.up_proj.weight": "ffn_up",
        "mlp.down_proj.weight": "ffn_down",
        "input_layernorm.weight": "attn_norm",
        "post_attention_layernorm.weight": "ffn_norm",
    }
    return f"blk.{layer}.{parts[rest]}.weight"


def interleaved(name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection with the halves of each head interleaved, as llama.cpp rotates them."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def tiny_drafter(folder: Path, config: DrafterConfig = DRAFTER, seed: int = 1) -> Path:
    """A drafter with random weights: it drafts, and is mostly wrong."""
    torch.manual_seed(seed)
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_drafter(model.eval(), folder)
    return folder
