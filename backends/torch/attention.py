"""Attention of target passes: SDPA that reads cached keys and values in place, registered with transformers.

transformers' own path repeats the keys of grouped heads in memory whenever there is a mask; with a mask over a long cache
that copy costs more than the attention. Here query heads that share a KV head become extra query rows instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from dspark_cli.backends.base import DsparkError

NAME = "dspark_grouped"
#: arguments of other attention functions that change the result and are not handled here
UNKNOWN = ("s_aux", "sinks", "position_bias", "head_mask")


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [N, H, L, D], key and value [N, K, S, D], mask bool [N, 1, L, S] (True = visible) -> [N, L, H, D].

    softcap: scores = softcap * tanh(scores / softcap) before the mask.
    """
    del module
    unknown = [name for name in UNKNOWN if others.get(name) is not None]
    if unknown:
        raise DsparkError(f"this model's attention needs {', '.join(unknown)}, which the torch backend does not do")
    n, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    rows = query.reshape(n, kv_heads, group * length, dim)
    mask = attention_mask
    if mask is not None and group > 1 and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, group, 1)
    scale = dim**-0.5 if scaling is None else scaling
    if softcap is None:
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    else:
        out = _capped(rows * scale, key, value, mask, softcap)
    return out.reshape(n, heads, length, -1).transpose(1, 2).contiguous(), None


def _capped(rows: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float) -> Tensor:
    scores = torch.tanh(rows @ key.mT / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1).to(value) @ value


AttentionInterface.register(NAME, grouped_attention)
