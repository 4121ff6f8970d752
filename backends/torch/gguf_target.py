"""A GGUF target in torch, dequantized to float32: to check one backend against the other, not to answer with.

Same weights, other code: where logits or features of the two differ by more than rounding, one of them is wrong. The tokenizer
and the chat template are the file's own, as llama.cpp runs them.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
import transformers
from torch import Tensor

from dspark_cli.backends.base import DsparkError
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.backends.llamacpp.header import Header, read_header, read_tensor
from dspark_cli.backends.llamacpp.model import ChatTemplate, GgufTokenizer, Model
from dspark_cli.backends.torch import attention
from dspark_cli.backends.torch.devices import detect, pick
from dspark_cli.backends.torch.network import Network
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget, failures

ARCHITECTURE = "llama"
#: GGUF's names of what is not in a layer -> transformers'
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: and of what is
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufTorchTarget(TorchTarget):
    """A `TorchTarget` whose tokenizer belongs to libllama."""

    vocabulary: Model

    def close(self) -> None:
        super().close()
        self.vocabulary.close()


def open_gguf(path: str | Path, options: TorchOptions | None = None, *, name: str | None = None) -> GgufTorchTarget:
    """The GGUF at `path` in float32. Raises DsparkError for architectures and tensors that this does not translate."""
    file = check_file(Path(path))
    options = options or TorchOptions()
    header = read_header(file)
    config = config_of(header, file.name)
    facts = pick(options.device, detect())
    n_values = sum(prod(info.shape) for info in header.tensors.values())
    with failures(f"{file.name} in float32", 4 * n_values, facts):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.NAME
        )
        model.load_state_dict(weights_of(header, file, model))
        model.to(torch.device(facts.torch_name)).eval().requires_grad_(False)
    vocabulary = Model(file, vocab_only=True)
    tokenizer = GgufTokenizer(vocabulary)
    template = ChatTemplate(vocabulary, tokenizer)
    try:
        target = GgufTorchTarget(
            Network(model, file.name),
            tokenizer,
            lambda messages, thinking: template.render(messages, thinking=thinking),
            facts,
            options,
            name=name or file.stem,
            path=str(file),
        )
    except BaseException:
        vocabulary.close()
        raise
    target.vocabulary = vocabulary
    return target


def config_of(header: Header, name: str) -> transformers.LlamaConfig:
    """transformers' config for a GGUF header. Raises DsparkError for what LlamaConfig would not say."""
    if header.architecture != ARCHITECTURE:
        raise DsparkError(
            f"{name} is of architecture {header.architecture!r}; torch opens {ARCHITECTURE!r} GGUFs only, for checking",
            hint="--backend auto",
        )
    scaled = header.of_model("rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors or scaled != "none":
        raise DsparkError(
            f"{name} scales its rotary positions ({scaled}), which is not translated", hint="--backend auto"
        )
    heads = int(header.of_model("attention.head_count"))
    n_embd = int(header.of_model("embedding_length"))
    return transformers.LlamaConfig(
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        hidden_size=n_embd,
        intermediate_size=int(header.of_model("feed_forward_length")),
        num_hidden_layers=int(header.of_model("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(header.of_model("attention.head_count_kv", heads)),
        head_dim=int(header.of_model("attention.key_length", n_embd // heads)),
        max_position_embeddings=int(header.of_model("context_length")),
        rms_norm_eps=float(header.of_model("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(header.of_model("rope.freq_base", 10000.0))},
        tie_word_embeddings="output.weight" not in header.tensors,
    )


def weights_of(header: Header, file: Path, model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor under transformers' name. Raises DsparkError for one that has none there."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for name, info in header.tensors.items():
        part = name.removesuffix(".weight").split(".")
        if len(part) == 1 and part[0] in WHOLE:
            key = WHOLE[part[0]]
        elif len(part) == 3 and part[0] == "blk" and part[2] in PARTS:
            key = f"model.layers.{part[1]}.{PARTS[part[2]]}"
        else:
            raise DsparkError(f"{file.name} has a tensor {name}, which is not translated")
        tensor = torch.from_numpy(read_tensor(file, info))
        weights[f"{key}.weight"] = halves(tensor, heads[part[-1]]) if part[-1] in heads else tensor
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads * D, d] with the pairs that llama.cpp rotates together D/2 apart again."""
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
