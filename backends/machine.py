"""What this process may use of the machine."""

from __future__ import annotations

import os

import psutil


def usable_cores() -> int:
    """Physical cores this process may run on: a second thread on one core slows matrix kernels down."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
