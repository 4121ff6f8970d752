"""Where training runs, and what is quick there."""

from __future__ import annotations

import time

import torch


def training_device() -> torch.device:
    """The first accelerator that torch finds, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def device_name() -> str:
    """What a recipe says of it."""
    device = training_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def quick_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are worth it there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and _cpu_bfloat16()


def _cpu_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones: asked of the machine, once."""
    global _answer
    if _answer is None:
        _answer = _seconds(torch.bfloat16) < 0.7 * _seconds(torch.float32)
    return _answer


_answer: bool | None = None


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return min(times)
