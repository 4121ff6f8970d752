"""A GGUF target as a torch module: dequantized, for training, where many sequences at once matter more than one.

It is made of the same blocks as the drafters. Decoding what users read stays with llama.cpp, which runs the file as it
is; this one runs the numbers that the file stands for.

Shapes: N = sequences, L = new positions, S = all positions, d = hidden size, V = vocabulary, K = KV heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dspark_cli.backends.base import FloatArray
from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.llamacpp.header import Header, read_header, read_tensor
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.layers import Attend, DecoderLayer, RMSNorm, Rope, Rotary, attention

#: architectures made of these blocks -> (rows of q and k are interleaved pairs, norms on q and k)
ARCHITECTURES = {"llama": (True, False), "qwen3": (False, True)}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufModel(nn.Module):
    """Decoder layers between an embedding and a head, as `load_gguf_model` fills them."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)

    @property
    def scale(self) -> float:
        """Attention scale of every layer."""
        return self.config.head_dim**-0.5

    def forward(self, ids: Tensor, rope: Rope, attends: Sequence[Attend], wanted: Sequence[int] = ()) -> list[Tensor]:
        """ids [N, L] -> hidden states [N, L, d] after the layers `wanted` (-1 = embeddings), then the final normed ones."""
        hidden = self.embed_tokens(ids)
        after = {-1: hidden}
        for i, (layer, attend) in enumerate(zip(self.layers, attends, strict=True)):
            hidden = after[i] = layer(hidden, rope, attend)
        return [*(after[i] for i in wanted), self.norm(hidden)]

    def read(self, ids: Tensor, lengths: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Whole texts ids [N, L] of `lengths` [N] (padded behind) in one pass: what `forward` gives."""
        length = ids.shape[1]
        columns = torch.arange(length, device=ids.device)
        mask = (columns <= columns.unsqueeze(1)) & (columns < lengths.view(-1, 1, 1)).expand(-1, length, -1)
        mask = mask | torch.eye(length, dtype=torch.bool, device=ids.device)  # padding rows must see something

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return attention(queries, keys, values, self.scale, mask)

        return self(ids, self.rotary.span(0, length), [attend] * self.config.num_layers, wanted)


class Columns:
    """Keys and values of N texts that advance together, one column a step; old columns are given up when none is left.

    A row may begin a new text at any column: it then sees its own columns only. Rotary positions are columns; attention
    depends on their differences alone.
    """

    def __init__(self, model: GgufModel, rows: int, capacity: int) -> None:
        c = model.config
        shape = (c.num_layers, rows, capacity, c.num_kv_heads, c.head_dim)
        like: Tensor = model.norm.weight  # type: ignore[assignment]
        self._keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._values = torch.zeros_like(self._keys)
        self._model, self._capacity = model, capacity
        self.column = 0  # of the next step
        self.begins = torch.zeros(rows, dtype=torch.int64)  # first column of each row's text
        self._origin = 0  # column that index 0 of the buffers holds

    @property
    def device(self) -> torch.device:
        return self._keys.device

    def step(self, ids: Tensor) -> Tensor:
        """ids [N] -> final hidden states [N, d], on the model's device."""
        at = self.column - self._origin
        if at == self._capacity:
            self._compact()
            at = self.column - self._origin
        first = int(self.begins.min()) - self._origin
        columns = torch.arange(first, at + 1)
        mask = (columns >= (self.begins - self._origin).unsqueeze(1)).unsqueeze(1).to(self.device)
        attends = [self._attend(layer, first, at, mask) for layer in range(self._model.config.num_layers)]
        rope = self._model.rotary.span(self.column, 1)
        self.column += 1
        return self._model(ids.to(self.device).unsqueeze(1), rope, attends)[-1][:, 0]

    @staticmethod
    def bytes_per_row(model: GgufModel, capacity: int) -> int:
        """Memory of one text of up to `capacity` tokens."""
        c = model.config
        return 2 * model.norm.weight.itemsize * c.num_layers * capacity * c.num_kv_heads * c.head_dim  # type: ignore[union-attr]

    def _attend(self, layer: int, first: int, at: int, mask: Tensor) -> Attend:
        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self._keys[layer, :, at], self._values[layer, :, at] = keys[:, 0], values[:, 0]
            seen = slice(first, at + 1)
            return attention(queries, self._keys[layer, :, seen], self._values[layer, :, seen], self._model.scale, mask)

        return attend

    def _compact(self) -> None:
        """Give up columns that no text needs."""
        dead = int(self.begins.min()) - self._origin
        if dead <= 0:
            raise DsparkError(f"a text has grown to {self._capacity} tokens, more than this batch holds")
        live = self._capacity - dead
        for buffer in (self._keys, self._values):
            for layer in buffer:  # a copy of one at a time
                layer[:, :live] = layer[:, dead:].clone()
        self._origin += dead


def untranslated(path: Path) -> str:
    """Why torch cannot run the GGUF at `path` as llama.cpp does; "" if it can."""
    header = read_header(path)
    if header.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"{path.name} is of architecture {header.architecture!r}; torch opens GGUF files of {known}"
    if (scaling := header.of_model("rope.scaling.type") or "none") != "none":
        return f"torch cannot open GGUF files with rope scaling {scaling!r} yet"
    # A table of rotary factors, biases, experts: left out, the numbers would be those of another model.
    unknown = sorted(name for name in header.tensors if not _name(name))
    return f"{path.name} has {', '.join(unknown[:3])}, which torch does not run" if unknown else ""


def load_gguf_model(path: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> GgufModel:
    """The target in `path`, dequantized to `dtype`. Raises DsparkError for one that is not of these blocks alone."""
    if reason := untranslated(path):
        raise DsparkError(reason, hint="llama.cpp runs the file as it is")
    header = read_header(path)
    if "token_embd.weight" not in header.tensors:
        raise DsparkError(f"{path.name} has no token_embd.weight, which a model has")
    config = _config(header)
    with torch.device("meta"):
        model = GgufModel(config)
    paired = ARCHITECTURES[header.architecture][0]
    weights = {
        _name(name): _weight(read_tensor(path, info), name, config, paired).to(dtype)
        for name, info in header.tensors.items()
        if _name(name)
    }
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    missing = sorted(set(model.state_dict()) - set(weights))
    if missing:
        raise DsparkError(f"{path.name} lacks {', '.join(missing[:3])}, which a model of this kind has")
    model.load_state_dict(weights, assign=True, strict=False)
    model.rotary = Rotary(config)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _config(header: Header) -> DrafterConfig:
    value, n_vocab = header.of_model, header.tensors["token_embd.weight"].shape[0]
    hidden, heads = value("embedding_length"), value("attention.head_count")
    return DrafterConfig(
        kind="target",
        family="qwen3",
        hidden_size=hidden,
        target_hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", hidden // heads),
        vocab_size=n_vocab,
        draft_vocab_size=n_vocab,
        block_size=1,
        target_layer_ids=(-1,),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=value("rope.freq_base", 10000.0),
        max_position_embeddings=value("context_length", 4096),
        qk_norm=ARCHITECTURES[header.architecture][1],
    )


def _name(gguf_name: str) -> str:
    """Our name of a GGUF tensor; "" for one we do not use."""
    fixed = {
        "token_embd.weight": "embed_tokens.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "lm_head.weight",
    }
    if not gguf_name.startswith("blk."):
        return fixed.get(gguf_name, "")
    _, number, what, *kind = gguf_name.split(".")
    return f"layers.{number}.{_LAYER_NAMES[what]}.weight" if what in _LAYER_NAMES and kind == ["weight"] else ""


def _weight(stored: FloatArray, name: str, config: DrafterConfig, paired: bool) -> Tensor:
    array = torch.from_numpy(stored)
    if paired and name.endswith(("attn_q.weight", "attn_k.weight")):
        # llama.cpp turns neighbours (2i, 2i+1) of a head, our rotary turns (i, i + D/2): put the rows back.
        half = config.head_dim // 2
        array = array.view(-1, half, 2, array.shape[1]).transpose(1, 2).reshape(array.shape)
    return array
