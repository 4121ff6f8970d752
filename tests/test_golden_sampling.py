"""Stochastic mode: draft and target distributions, accept probabilities, residuals, accepted counts; the bare rules.

The rules of the engine are used where it has them (dspark_cli.engine.sampling).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from test_golden_cases import (
    GOLDEN,
    Case,
    all_cases,
    assert_matches,
    drafter_of,
    read_tensors,
    softmax,
    target_of,
    tensors,
)

pytest.importorskip("torch")

from dspark_cli.backends.base import DraftRequest
from tests_support import whole_row

sampling = pytest.importorskip("dspark_cli.engine.sampling")
SamplingOptions = pytest.importorskip("dspark_cli.engine.rounds").SamplingOptions

UNIT = read_tensors(GOLDEN / "unit" / "sampling.safetensors") if (GOLDEN / "unit").is_dir() else {}


def accept_probs(target_probs: np.ndarray, draft_probs: np.ndarray, tokens: np.ndarray) -> list[float]:
    """[k] for distributions [k, V] and the draft tokens [k]."""
    rows = zip(target_probs, draft_probs, tokens, strict=True)
    return [sampling.accept_probability(target, draft, int(token)) for target, draft, token in rows]


def residuals(target_probs: np.ndarray, draft_probs: np.ndarray) -> np.ndarray:
    """[k, V] for distributions [k, V]."""
    return np.stack([sampling.residual(*row) for row in zip(target_probs, draft_probs, strict=True)])


def accepted_counts(uniforms: np.ndarray, accept: list[float]) -> list[int]:
    """Drafts accepted, up to the first failure, for each row of uniforms [n, k]."""
    return (uniforms < np.asarray(accept)).cumprod(axis=1).sum(axis=1).tolist()


@lru_cache
def measured_stochastic(case_name: str) -> dict[str, Any]:
    case = next(case for case in all_cases() if case.name == case_name)
    given = case.tensors
    tokens = given["stoch.draft_tokens"][0]
    prompt_logits, features = target_of(case)(case.prompt, case.layers)
    anchor = int(prompt_logits[-1].argmax())
    logits, _ = target_of(case)([*case.prompt, anchor, *tokens.tolist()], case.layers)
    drafter = drafter_of(case)
    drafter.observe(0, case.prompt, features)
    found: dict[str, Any] = {
        "stoch.anchor_token": [anchor],
        "stoch.draft_tokens": tokens[None],
        "stoch.uniforms": given["stoch.uniforms"],
    }
    for label in sorted({match[1] for name in given if (match := re.match(r"stoch\.t(\d+)\.", name))}):
        temperature = int(label) / 10
        target_probs = softmax(logits[len(case.prompt) :], temperature)
        draft_probs = forced_probs(drafter, anchor, tokens, temperature)
        accept = accept_probs(target_probs[:-1], draft_probs, tokens)
        found |= {
            f"stoch.t{label}.draft_probs": draft_probs[None],
            f"stoch.t{label}.target_probs": target_probs[None],
            f"stoch.t{label}.accept_probs": np.asarray([accept]),
            f"stoch.t{label}.residual_probs": residuals(target_probs[:-1], draft_probs)[None],
            f"stoch.t{label}.accepted_counts": accepted_counts(given["stoch.uniforms"], accept),
        }
    return found


def forced_probs(drafter: Any, anchor: int, tokens: np.ndarray, temperature: float) -> np.ndarray:
    """The drafter's distributions [k, V] while the given tokens are drafted."""

    def take_given(row: np.ndarray, drafted: list[int], ids: np.ndarray | None) -> tuple[int, np.ndarray]:
        return int(tokens[len(drafted)]), softmax(whole_row(row, ids, drafter.vocabulary.n_vocab), temperature)

    draft = drafter.propose([DraftRequest(0, anchor, len(tokens), take_given)])[0]
    assert draft.tokens.tolist() == tokens.tolist()
    return draft.probs


@pytest.mark.parametrize(("case", "name"), tensors("stochastic"))
def test_stochastic(case: Case, name: str) -> None:
    assert_matches(name, measured_stochastic(case.name)[name], case.tensors[name])


@pytest.mark.parametrize("name", ["accept_probs", "residual_probs"])
def test_accept_and_residual_rules(name: str) -> None:
    if name == "accept_probs":
        got: Any = accept_probs(UNIT["target_probs"], UNIT["draft_probs"], UNIT["draft_tokens"])
    else:
        got = residuals(UNIT["target_probs"], UNIT["draft_probs"])
    assert_matches(name, got, UNIT[name])


@pytest.mark.parametrize("name", [name for name in UNIT if name.startswith("probs_t")])
def test_temperature_rule(name: str) -> None:
    rows = UNIT["logits"][0]
    temperature = float(name.removeprefix("probs_t"))
    assert_matches(name, softmax(rows, temperature)[None], UNIT[name])
    options = SamplingOptions(temperature=temperature)
    assert_matches(name, np.stack([sampling.probabilities(row, options) for row in rows])[None], UNIT[name])


def test_argmax_rule() -> None:
    assert_matches("argmax", UNIT["logits"].argmax(-1), UNIT["argmax"])


def test_every_unit_tensor_has_a_test() -> None:
    used = {"target_probs", "draft_probs", "draft_tokens", "accept_probs", "residual_probs", "logits", "argmax"}
    assert [name for name in UNIT if name not in used and not name.startswith("probs_t")] == []
    assert used <= UNIT.keys()
