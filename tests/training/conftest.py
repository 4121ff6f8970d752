"""One tiny target, and one finished training for it, for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra 'torch' is not installed")

from tiny_training import train

from tiny_gguf import write_tiny_target


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("tiny") / "tiny.F32.gguf")


@pytest.fixture(scope="session")
def trained(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a finished DSpark training, its drafter as d.gguf in it."""
    work = tmp_path_factory.mktemp("train") / "work"
    result = train(tiny_target, work, "--out", str(work / "d.gguf"))
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    return work
