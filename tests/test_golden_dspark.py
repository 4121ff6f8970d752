"""Every recorded tensor of the DSpark and DFlash rounds, measured inside the drafter as the engine drives it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from test_golden_cases import Case, all_cases, assert_matches, drafter_of, target_of, tensors

torch = pytest.importorskip("torch")

from dspark_cli.backends.base import DraftRequest  # noqa: E402
from tests_support import whole_row  # noqa: E402


class Probe:
    """Records what passes through a drafter's modules during one call."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.model = drafter, drafter.model
        self.seen: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Probe:
        modules = {f"layer{i}": layer for i, layer in enumerate(self.model.layers)}
        modules |= {"norm": self.model.norm, "fused": self.model.hidden_norm, "confidence": self.model.confidence_head}
        for name, module in modules.items():
            if module is not None:
                self._handles.append(module.register_forward_hook(self._keep(name)))
        self._handles.append(self.model.embed_tokens.register_forward_hook(self._inputs("ids")))
        self._handles.append(self.model.rotary.register_forward_hook(self._inputs("positions")))
        return self

    def _keep(self, name: str) -> Any:
        return lambda module, inputs, output: self.seen.__setitem__(name, output.clone())

    def _inputs(self, name: str) -> Any:
        return lambda module, inputs, output: self.seen.__setitem__(name, inputs[0].clone())

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def n_rounds(case: Case) -> int:
    return sum(name.endswith(".start") for name in case.tensors)


@lru_cache
def measured_rounds(case_name: str) -> dict[str, Any]:
    """All round tensors of a case, the features and tokens being the target's own."""
    case = next(case for case in all_cases() if case.name == case_name)
    target, drafter = target_of(case), drafter_of(case)
    found: dict[str, Any] = {}
    ids, start = case.prompt, 0
    logits, features = target(ids, case.layers)
    anchor, pending = int(logits[-1].argmax()), features
    for r in range(n_rounds(case)):
        before, start = drafter.length(0), start + len(pending)
        with Probe(drafter) as probe:
            drafter.observe(0, ids[before:start], pending)
            fused = probe.seen["fused"]
            draft = drafter.propose([DraftRequest(0, anchor, drafter.block_size)])[0]
        verify = [anchor, *draft.tokens.tolist()]
        logits, features = target([*ids, *verify], case.layers)
        rows = logits[start:]
        wrong = np.flatnonzero(rows[:-1].argmax(1) != draft.tokens)
        accepted = int(wrong[0]) if len(wrong) else len(draft)
        seen = probe.seen
        positions = [*range(before, start), *seen["positions"][0].tolist()]
        found |= {
            f"round{r}.start": [start],
            f"round{r}.draft_input_ids": seen["ids"],
            f"round{r}.draft_position_ids": [positions],
            f"round{r}.draft_cache_len_before": [before],
            f"round{r}.draft_cache_len_after": [drafter.length(0)],
            f"round{r}.target_features": pending[None],
            f"round{r}.fused_features": fused[None],
            f"round{r}.draft_hidden": seen["norm"],
            f"round{r}.base_logits": drafter.model.base_logits(seen["norm"]).detach(),
            f"round{r}.corrected_logits": corrected_logits(drafter, anchor)[None],
            f"round{r}.draft_tokens": draft.tokens[None],
            f"round{r}.verify_input_ids": [verify],
            f"round{r}.verify_position_ids": [list(range(start, start + len(verify)))],
            f"round{r}.verify_logits": rows[None],
            f"round{r}.accepted_count": [accepted],
            f"round{r}.next_token": [int(rows[accepted].argmax())],
        }
        found |= {f"round{r}.draft_layer{i}_output": seen[f"layer{i}"] for i in range(len(drafter.model.layers))}
        if "confidence" in seen:
            found[f"round{r}.confidence_logits"] = seen["confidence"]
        ids = [*ids, *verify[: accepted + 1]]
        anchor, pending = int(rows[accepted].argmax()), features[start : start + accepted + 1]
    return found


def corrected_logits(drafter: Any, anchor: int) -> np.ndarray:
    """float32 [B, V] along the greedy chain, as a sampling request sees them."""
    rows: list[np.ndarray] = []

    def take_best(row: np.ndarray, drafted: list[int], ids: np.ndarray | None) -> tuple[int, np.ndarray]:
        rows.append(whole_row(row, ids, drafter.vocabulary.n_vocab))
        return int(rows[-1].argmax()), rows[-1]

    drafter.propose([DraftRequest(0, anchor, drafter.block_size, take_best)])
    return np.stack(rows)


@pytest.mark.parametrize(("case", "name"), tensors("round", "dspark", "dflash"))
def test_round(case: Case, name: str) -> None:
    assert_matches(name, measured_rounds(case.name)[name], case.tensors[name])
