"""The blocks drafters are made of: RMSNorm, rotary positions, attention, MLP, decoder layer.

One decoder layer serves the Qwen3 and the Gemma4 wiring; what differs comes from `DrafterConfig`. Shapes: N = batch,
L = query rows, S = keys, D = head_dim, H = heads, K = KV heads, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspark_cli.backends.torch.config import DrafterConfig

#: queries, keys and values of a block [N, L, heads, D] -> attended values [N, L, H*D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (weight itself, not 1 + weight); `weighted=False` leaves it out."""

    weight: nn.Parameter | None

    def __init__(self, width: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        # The fused kernel wants one dtype; under autocast x may be shorter than the weights.
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.width,), weight, self.eps)


class TokenEmbedding(nn.Embedding):
    """Token rows times `embed_scale` (Gemma: sqrt(d), rounded to the weights' dtype; it is not in the stored weight)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.embed_scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap); unchanged without a cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Rotary(nn.Module):
    """cos and sin of the positions, from a table that grows on demand. Halves, not interleaved pairs."""

    _cos: Tensor
    _sin: Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.frequencies = rotary_frequencies(config)
        self.register_buffer("_cos", torch.empty(0, config.head_dim), persistent=False)
        self.register_buffer("_sin", torch.empty(0, config.head_dim), persistent=False)

    def forward(self, positions: Tensor, last: int) -> Rope:
        """cos, sin [..., D] of int64 positions [...]; `last` is the largest (the caller knows it without a sync)."""
        if last >= len(self._cos):
            self._grow(last)
        return self._cos[positions], self._sin[positions]

    def span(self, start: int, count: int) -> Rope:
        """cos, sin [count, D] of positions start, start+1, ..."""
        if start + count > len(self._cos):
            self._grow(start + count)
        return self._cos[start : start + count], self._sin[start : start + count]

    @torch.inference_mode(False)  # a table grown while drafting must also serve training
    def _grow(self, last: int) -> None:
        size = max(256, 2 * len(self._cos), last + 1)
        angles = torch.outer(torch.arange(size, dtype=torch.float32), self.frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        self._cos, self._sin = angles.cos().to(self._cos), angles.sin().to(self._sin)


def rotary_frequencies(config: DrafterConfig) -> Tensor:
    """float32 [D/2]. "proportional" turns only the first part of the pairs; the others have frequency zero."""
    half = config.head_dim // 2
    powers = torch.arange(half, dtype=torch.float32) * 2 / config.head_dim
    frequencies = 1.0 / config.rope_theta**powers
    if config.rope_type == "proportional":
        frequencies[int(config.partial_rotary_factor * config.head_dim // 2) :] = 0.0
    return frequencies


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply rotary positions to x [N, L, heads, D] with cos, sin [L, D] or [N, L, D]."""
    cos, sin = (part.unsqueeze(-2) for part in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Projections of one layer; who attends to what is the caller's business (`Attend`)."""

    def __init__(self, config: DrafterConfig, in_features: int | None = None) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.attention_bias
        width = in_features or d
        self.head_dim = config.head_dim
        self.scale = 1.0 if config.gemma else config.head_dim**-0.5
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = None
        if not config.shared_key_value:
            self.v_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, d, bias=bias)
        self.q_norm = _head_norm(config, config.qk_norm)
        self.k_norm = _head_norm(config, config.qk_norm)
        # Gemma4 norms the values too, without a weight
        self.v_norm = RMSNorm(config.head_dim, config.rms_norm_eps, weighted=False) if config.gemma else nn.Identity()

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """[N, L, H, D] of x [N, L, width]."""
        return rotate(self.q_norm(self._heads(self.q_proj(x))), rope)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values [N, L, K, D] of x [N, L, width]: block rows after their norm, or the fused features."""
        keys = self._heads(self.k_proj(x))
        values = keys if self.v_proj is None else self._heads(self.v_proj(x))
        return rotate(self.k_norm(keys), rope), self.v_norm(values)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        keys, values = self.keys_values(x, rope)
        return self.o_proj(attend(self.queries(x, rope), keys, values))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _head_norm(config: DrafterConfig, wanted: bool) -> nn.Module:
    return RMSNorm(config.head_dim, config.rms_norm_eps) if wanted else nn.Identity()


class MLP(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.tanh_gelu = config.activation == "gelu_pytorch_tanh"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.tanh_gelu else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP with residuals. Gemma4 norms the branches before they are added and scales the output."""

    layer_scalar: Tensor

    def __init__(self, config: DrafterConfig, in_features: int | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, in_features)
        self.mlp = MLP(config)
        names = ["input_layernorm", "post_attention_layernorm"]
        self.sandwich = config.gemma
        if self.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
            self.register_buffer("layer_scalar", torch.ones(1))
        for name in names:
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """x [N, L, d] -> [N, L, d]."""
        return self.after_attention(x, self.self_attn(self.input_layernorm(x), rope, attend))

    def after_attention(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: both residual adds and the MLP; all [N, L, d]."""
        if not self.sandwich:
            x = residual + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = residual + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar


def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of queries [N, L, H, D] over keys and values [N, S, K, D] -> [N, L, H*D].

    mask: bool [N or 1, L, S], True = visible; None = everything is.
    Query heads that share a KV head become extra query rows, so keys are never repeated in memory.
    """
    n, length, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    q = queries.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, group * length, dim)
    if mask is not None:
        mask = mask.repeat(1, group, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.view(n, kv_heads, group, length, dim).permute(0, 3, 1, 2, 4).reshape(n, length, heads * dim)
