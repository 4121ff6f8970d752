"""A GGUF target in torch, dequantized to float32: to check one backend against the other, not to answer with.

Same weights, other code: where logits or features of the two differ by more than rounding, one of them is wrong. The tokenizer
and the chat template are the file's own, as llama.cpp runs them.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from dspark_cli.backends.base import DsparkError
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.llamacpp.model import ChatTemplate, GgufTokenizer, Model
from dspark_cli.backends.torch import attention
from dspark_cli.backends.torch.devices import detect, pick
from dspark_cli.backends.torch.gguf_model import load_gguf_model
from dspark_cli.backends.torch.loading import failures
from dspark_cli.backends.torch.network import Network
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget


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
    facts = pick(options.device, detect())
    n_values = sum(prod(info.shape) for info in read_header(file).tensors.values())
    with failures(f"{file.name} in float32", 4 * n_values, facts):
        model = transformers_model(file).to(torch.device(facts.torch_name)).eval().requires_grad_(False)
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


def transformers_model(file: Path) -> Any:
    """The weights of a GGUF, as `gguf_model` reads them, in the module that transformers has for them.

    Raises DsparkError for what that module does not do.
    """
    header = read_header(file)
    if "rope_freqs.weight" in header.tensors:
        raise DsparkError(f"{file.name} scales its rotary positions by a table, which is not translated")
    read = load_gguf_model(file)
    c = read.config
    if c.qk_norm:
        raise DsparkError(f"{file.name} norms its queries and keys; torch opens plain llama GGUFs only, for checking")
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings="output.weight" not in header.tensors,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention.NAME
    )
    weights = read.state_dict()
    model.load_state_dict({name if name.startswith("lm_head.") else f"model.{name}": weights[name] for name in weights})
    return model
