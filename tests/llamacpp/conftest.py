"""One target and a few synthetic drafters for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from drafters import OPTIONS, REDUCED, TEXT, features_of

import synthetic
from dspark_cli.backends.base import FloatArray
from dspark_cli.backends.llamacpp import drafter as drafter_module
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.kernels import cpu_drafter
from synthetic import SPEC


@pytest.fixture(params=["kernels", "libllama"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes the drafters' passes: our kernels where there are any here, or libllama."""
    if request.param == "libllama":
        monkeypatch.setattr(drafter_module, "by_kernels", lambda *_: None)
    elif (problem := cpu_drafter.unfit()) is not None:
        pytest.skip(f"no kernels here: {problem}")
    return str(request.param)


@pytest.fixture(scope="module")
def target() -> Iterator[LlamaCppTarget]:
    with LlamaCppTarget(synthetic.target_path(), OPTIONS) as opened:
        opened.request_features(SPEC.target_layers)
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drafters")


@pytest.fixture(scope="module")
def known(folder: Path) -> Path:
    return synthetic.write(folder, synthetic.known_tensors(), quant="F16", name="known.gguf")


@pytest.fixture(scope="module")
def random(folder: Path) -> Path:
    return synthetic.write(folder, synthetic.random_tensors(), name="random.gguf")


@pytest.fixture(scope="module")
def reduced(folder: Path) -> Path:
    return synthetic.write(folder, synthetic.random_tensors(REDUCED), REDUCED, name="reduced.gguf")


@pytest.fixture(scope="module")
def ids(target: LlamaCppTarget) -> list[int]:
    return target.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def features(target: LlamaCppTarget, ids: list[int]) -> FloatArray:
    return features_of(target, ids)
