"""The recorded runs of test_golden_engine.py on the device: target with recorded passes, drafter, both kernel paths."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cuda_device import DEVICE, PATH, record_again, torch

pytest.importorskip("transformers")

import test_golden_engine
from dspark_cli.backends.torch.checkpoint import load_drafter
from dspark_cli.backends.torch.devices import detect, pick
from dspark_cli.backends.torch.drafter import TorchDrafter, make_drafter
from dspark_cli.backends.torch.loading import load_model
from dspark_cli.backends.torch.network import Network
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget
from dspark_cli.kernels import dispatch
from test_golden_cases import GOLDEN, Case
from test_golden_engine import (  # noqa: F401  (collected here once more, with what the fixture below puts in place)
    IdTokenizer,
    test_several_requests_at_once_give_the_same,
    test_stop_tokens_end_it_where_they_did,
    test_the_recorded_prompt,
    test_the_recorded_run,
    test_thresholds_cut_where_they_did,
)


@lru_cache
def golden_target(name: str, n_seq: int = 1) -> TorchTarget:
    """A target of the set; it has no tokenizer."""
    place = GOLDEN / name
    network = Network(load_model(place, torch.float32, torch.device(DEVICE)), place.name)
    options = TorchOptions(n_seq=n_seq, threads=2, device=DEVICE)
    words = {"name": place.name, "path": str(place)}
    facts = pick(DEVICE, detect())
    return record_again(
        TorchTarget(network, IdTokenizer(len(network.head)), lambda messages, thinking: "", facts, options, **words)
    )


@lru_cache
def golden_model(place: Path) -> Any:
    return load_drafter(place, device=DEVICE)


def golden_drafter(case: Case) -> TorchDrafter:
    return make_drafter(golden_model(case.draft), name=case.name)


@pytest.fixture(autouse=True, params=sorted({PATH, "reference"}))
def _on_the_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.use(request.param)
    monkeypatch.setattr(test_golden_engine, "golden_target", golden_target)
    monkeypatch.setattr(test_golden_engine, "drafter_of", golden_drafter)
