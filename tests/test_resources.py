"""Everything native is given back: repeated open and close does not grow memory, on the good path and on failing ones."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dspark_cli.backends.base import BadInput, DsparkError
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.session import OpenOptions, Session

pytestmark = pytest.mark.slow

ALLOWED_MB = 20  # one leaked target would be 100 MB of weights or 90 MB of cache each cycle


def growth_mb(cycle: Callable[[], None], cycles: int) -> float:
    """Growth of resident memory over `cycles`, after a few that warm caches and allocators up."""
    process = psutil.Process()
    for _ in range(5):
        cycle()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(cycles):
        cycle()
    gc.collect()
    return (process.memory_info().rss - before) / 1e6


def test_fifty_sessions_leave_nothing_behind(embedded_gguf: Path) -> None:
    options = OpenOptions(embedded_gguf, "smollm2-135m", drafter=str(embedded_gguf), policy="fixed:2", ctx=512)

    def cycle() -> None:
        with Session.open(options) as session:
            request = session.text_request("The sea is", max_tokens=3, sampling=SamplingOptions())
            assert sum(len(r.tokens) for r in session.run(request)) == 3

    assert growth_mb(cycle, 50) < ALLOWED_MB


def test_failing_to_open_leaves_nothing_behind(embedded_gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(embedded_gguf.read_bytes()[:5_000_000])
    options = OpenOptions(embedded_gguf, "smollm2-135m", drafter=str(broken), ctx=512)

    def cycle() -> None:
        with pytest.raises(DsparkError, match="cannot be loaded"):
            Session.open(options)
        with pytest.raises(BadInput, match="was trained on"):
            LlamaCppTarget(embedded_gguf, ContextOptions(ctx=100_000))

    assert growth_mb(cycle, 20) < ALLOWED_MB
