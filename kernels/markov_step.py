"""One step of DSpark's sequential head: bias, add, and the choice of a token, in one reading of the bias matrix.

    corrected[n, v] = base[n, v] + sum_r latent[n, r] * w2[v, r]

and from it the best token, or one drawn at a temperature. The matrix (V x r) is all the traffic there is: for a vocabulary of
151936 and rank 256 in bfloat16 it is 78 MB a step, the logits are 0.6 MB.

Shapes: N = sequences, V = draft vocabulary, r = rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark_cli.kernels.dispatch import path_for
from dspark_cli.kernels.draws import draw

#: below this a temperature is greedy
GREEDY = 1e-5


def markov_step(
    base: Tensor,
    latent: Tensor,
    w2: Tensor,
    temperature: Tensor | None = None,
    uniform: Tensor | None = None,
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] and corrected logits [N, V] of base [N, V], latent [N, r], w2 [V, r].

    temperature, uniform: float32 [N]; None is greedy. A row below GREEDY takes its best token; ties go to the lowest id.
    """
    if path_for(path, on_gpu=base.is_cuda) == "reference":
        return reference(base, latent, w2, temperature, uniform)
    return _triton(base, latent, w2, temperature, uniform)


def reference(
    base: Tensor, latent: Tensor, w2: Tensor, temperature: Tensor | None = None, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`markov_step` in torch."""
    corrected = base + F.linear(latent, w2)
    best = corrected.argmax(dim=-1)
    if temperature is None or uniform is None:
        return best, corrected
    scaled = corrected.float() / temperature.clamp(min=GREEDY).unsqueeze(1)
    drawn = draw(torch.exp(scaled - scaled.amax(dim=-1, keepdim=True)), uniform)
    return torch.where(temperature < GREEDY, best, drawn), corrected


def _triton(
    base: Tensor, latent: Tensor, w2: Tensor, temperature: Tensor | None, uniform: Tensor | None
) -> tuple[Tensor, Tensor]:
    from dspark_cli.kernels import markov_step_triton as kernels

    n, width = base.shape
    rank = latent.shape[1]
    base, latent, w2 = base.contiguous(), latent.contiguous(), w2.contiguous()
    block = kernels.BLOCK
    blocks = -(-width // block)
    corrected = torch.empty(n, width, dtype=torch.float32, device=base.device)
    partial = {"dtype": torch.float32, "device": base.device}
    peaks, masses = torch.empty(n, blocks, **partial), torch.empty(n, blocks, **partial)
    places = torch.empty(n, blocks, dtype=torch.int64, device=base.device)
    if temperature is None or uniform is None:
        temperature, uniform = torch.zeros(n, **partial), torch.zeros(n, **partial)
    temperature, uniform = temperature.float().contiguous(), uniform.float().contiguous()
    tokens = torch.empty(n, dtype=torch.int64, device=base.device)
    shape: dict[str, Any] = {"BLOCK": block, "RANK": _power(rank), "GREEDY": GREEDY}
    kernels.correct[(blocks,)](
        *(base, latent, w2, temperature, corrected, peaks, places, masses, n, width, rank, blocks),
        **shape,
        num_warps=8,  # a block of 64 x 256 float32 then takes 64 registers a thread
    )
    kernels.choose[(n,)](
        *(corrected, peaks, places, masses, temperature, uniform, tokens, width, blocks),
        BLOCK=block,
        CHUNK=min(1024, _power(blocks)),
        GREEDY=GREEDY,
    )
    return tokens, corrected.to(base.dtype)


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
