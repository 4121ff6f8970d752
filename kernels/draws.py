"""Drawing from weights by one uniform number a row: inverse CDF in two levels, in float32.

One long float32 sum over a vocabulary of 262144 loses the small weights; sums over blocks, then inside one block, do not. And
Metal has no float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 [N]: the first index whose cumulative share exceeds `uniform` [N] in [0, 1); weights >= 0, float32 [N, V].

    A token without weight is never drawn.
    """
    n, width = weights.shape
    blocks = F.pad(weights, (0, -width % BLOCK)).view(n, -1, BLOCK)
    ends = blocks.sum(dim=-1).cumsum(dim=-1)
    wanted = uniform.to(weights) * ends[:, -1]
    block = torch.searchsorted(ends, wanted.unsqueeze(1), right=True).clamp(max=ends.shape[1] - 1)
    # rounding may lead past the last block with any weight
    block = torch.minimum(block, last_positive(blocks.sum(dim=-1)).unsqueeze(1))
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    place = torch.searchsorted(inside.cumsum(dim=-1), wanted.unsqueeze(1) - before, right=True)
    place = torch.minimum(place, last_positive(inside).unsqueeze(1))
    return (block * BLOCK + place).squeeze(1)


def last_positive(weights: Tensor) -> Tensor:
    """int64 [N]: the last index with weight, of [N, V]."""
    positions = torch.arange(weights.shape[-1], device=weights.device)
    return torch.where(weights > 0, positions, 0).amax(dim=-1)
