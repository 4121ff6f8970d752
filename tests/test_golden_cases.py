"""The reference vectors: where they lie, how a tensor is compared, the target they were recorded from.

Other test_golden_* files measure tensors and compare them by name, one test a tensor; this one checks the target and
that no tensor is left without a test. DSPARK_GOLDEN names another set in the same format.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file  # noqa: E402

from dspark_cli.backends.torch.checkpoint import load_drafter  # noqa: E402
from dspark_cli.backends.torch.dialects import read_config  # noqa: E402
from dspark_cli.backends.torch.drafter import TorchDrafter, make_drafter  # noqa: E402

GOLDEN = Path(os.environ.get("DSPARK_GOLDEN") or Path(__file__).parent / "golden")

#: which file measures a tensor: group -> pattern of its names
GROUPS = {
    "target": r"prompt_ids|prompt_logits|prompt_target_features|target_greedy_output_ids",
    "round": r"(round\d+|prefill)\..+",
    "run": r"(short\d+|stop_\w+|confidence_threshold\d+)\..+|all_draft_tokens|speculative_output_ids|\w+_lengths",
    "stochastic": r"stoch\..+",
}


@dataclass(frozen=True)
class Case:
    """One folder of cases/ with its recorded tensors."""

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def draft(self) -> Path:
        return self.folder / self.settings.get("draft", "draft")

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return read_tensors(self.folder / "io.safetensors")

    @property
    def prompt(self) -> list[int]:
        return self.tensors["prompt_ids"][0].tolist()

    @property
    def layers(self) -> list[int]:
        return list(self.settings["target_layer_ids"])


@lru_cache
def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


@lru_cache
def all_cases() -> tuple[Case, ...]:
    files = sorted(GOLDEN.glob("cases/*/case.json"))
    return tuple(Case(file.parent.name, file.parent, json.loads(file.read_text())) for file in files)


def cases(*methods: str) -> list[Any]:
    """Parameters: every case of these methods (all by default)."""
    return [pytest.param(case, id=case.name) for case in all_cases() if not methods or case.method in methods]


def tensors(group: str, *methods: str) -> list[Any]:
    """Parameters (case, tensor name): every recorded tensor of a group."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in all_cases()
        if not methods or case.method in methods
        for name in case.tensors
        if re.fullmatch(GROUPS[group], name)
    ]


def assert_matches(name: str, got: Any, want: np.ndarray) -> None:
    """Exact for ids and counts, atol 2e-5 for probabilities, else atol and rtol 1e-4 (the set's README)."""
    got = np.asarray(got)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, recorded {want.shape}"
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want, err_msg=name)
    elif name.endswith("_probs") or ".probs_" in name or name.startswith("probs_"):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=0, err_msg=name)
    else:
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4, err_msg=name)


class ReferenceTarget:
    """A target of the set in transformers, without a cache: every pass is over the whole sequence."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, ids: list[int], layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [L, V] and features [L, m*d] of `ids` [L]."""
        out = self.model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        features = torch.cat([out.hidden_states[layer + 1] for layer in layers], dim=-1)
        return out.logits[0].numpy(), features[0].numpy()


@lru_cache
def _load_target(folder: Path) -> ReferenceTarget:
    return ReferenceTarget(folder)


def target_of(case: Case) -> ReferenceTarget:
    folder = GOLDEN / case.settings["target"]
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return _load_target(folder)


@lru_cache
def _load_model(folder: Path) -> Any:
    torch.set_num_threads(1)
    return load_drafter(folder)


def drafter_of(case: Case) -> TorchDrafter:
    """A drafter with empty sequences; the weights are shared between calls."""
    return make_drafter(_load_model(case.draft), name=case.name)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float32 softmax over the last axis; one-hot at the lowest best index below temperature 1e-5."""
    if temperature < 1e-5:
        return np.eye(logits.shape[-1], dtype=np.float32)[logits.argmax(-1)]
    scaled = logits.astype(np.float32) / np.float32(temperature)
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def greedy(case: Case, length: int) -> list[int]:
    """Plain greedy continuation of the prompt until `length` ids."""
    ids = case.prompt
    while len(ids) < length:
        logits, _ = target_of(case)(ids, case.layers)
        ids.append(int(logits[-1].argmax()))
    return ids


@lru_cache
def measured_target(case_name: str) -> dict[str, Any]:
    case = next(case for case in all_cases() if case.name == case_name)
    logits, features = target_of(case)(case.prompt, case.layers)
    recorded = case.tensors["target_greedy_output_ids"]
    output = greedy(case, recorded.shape[1])
    return {
        "prompt_ids": [output[: case.settings["prompt_len"]]],
        "prompt_logits": logits[None],
        "prompt_target_features": features[None],
        "target_greedy_output_ids": [output],
    }


def test_the_set_has_cases() -> None:
    assert all_cases(), f"no cases under {GOLDEN}"


@pytest.mark.parametrize(("case", "name"), tensors("target"))
def test_target(case: Case, name: str) -> None:
    assert_matches(name, measured_target(case.name)[name], case.tensors[name])


@pytest.mark.parametrize("case", cases())
def test_every_tensor_has_a_test(case: Case) -> None:
    homeless = [name for name in case.tensors if not any(re.fullmatch(p, name) for p in GROUPS.values())]
    assert not homeless


@pytest.mark.parametrize("case", cases())
def test_config_says_what_the_case_says(case: Case) -> None:
    config, settings = read_config(case.draft), case.settings
    assert config.kind == case.method
    assert config.block_size == settings.get("block_size", settings.get("ttt_length"))
    assert list(config.target_layer_ids) == case.layers
    if case.method != "eagle3":
        assert config.sample_from_anchor
        assert config.mask_token_id == settings["mask_token_id"]
        assert config.markov_rank == settings["markov_rank"]
        assert config.markov_head_type == (settings["markov_head_type"] or "vanilla")
        assert config.confidence_head == settings["confidence_head"]
        assert config.confidence_head_with_markov == settings["confidence_head_with_markov"]
