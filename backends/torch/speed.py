"""Which number format makes this machine's drafter fastest: asked of the machine, not of a table."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from dspark_cli.backends.torch.config import DrafterConfig

REPEATS = 5


@torch.inference_mode()
def fastest_dtype(config: DrafterConfig, device: str | torch.device = "cpu") -> torch.dtype:
    """float32 or bfloat16, by timing the output head and the MLP of one block pass (tens of milliseconds).

    Small matrices times few rows: a CPU with bfloat16 instructions takes a fraction of the float32 time, one without
    several times as long.
    """
    shapes = [(config.draft_vocab_size, config.hidden_size), (config.intermediate_size, config.hidden_size)]
    rows = 1 if config.kind == "eagle3" else config.block_rows
    return min(
        (torch.float32, torch.bfloat16),
        key=lambda dtype: sum(_milliseconds(rows, shape, dtype, torch.device(device)) for shape in shapes),
    )


def _milliseconds(rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Best of a few runs of x [rows, n] @ weight [m, n].T for shape (m, n)."""
    weight = torch.ones(shape, dtype=dtype, device=device)  # not zeros: those share one page of memory
    x = torch.ones(rows, shape[1], dtype=dtype, device=device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        F.linear(x, weight).sum().item()  # .item() waits for an accelerator
        times.append(time.perf_counter() - start)
    return 1000 * min(times)
