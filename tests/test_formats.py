"""Requantized targets: they load, say what they are, and are made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_cli.backends.base import BadInput, DsparkError
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.bench.formats import requantize


@pytest.mark.parametrize("form", ["F16", "Q8_0", "F32"])
def test_requantize(form: str, embedded_gguf: Path, tmp_path: Path) -> None:
    path = requantize(embedded_gguf, form, tmp_path)
    with LlamaCppTarget(path) as target:
        assert target.info.format == form
    made = path.stat().st_mtime_ns
    assert requantize(embedded_gguf, form, tmp_path) == path
    assert path.stat().st_mtime_ns == made
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_made(embedded_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Q7_X"):
        requantize(embedded_gguf, "Q7_X", tmp_path)
    broken = tmp_path / "cut.gguf"
    broken.write_bytes(embedded_gguf.read_bytes()[:2_000_000])
    with pytest.raises(DsparkError, match=r"cut\.gguf cannot be made F16"):
        requantize(broken, "F16", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
