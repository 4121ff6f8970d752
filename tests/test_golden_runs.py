"""Whole greedy runs: the reference's loop around our drafters, with its stop, length and threshold rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from test_golden_cases import Case, all_cases, assert_matches, drafter_of, target_of, tensors

pytest.importorskip("torch")

from dspark_cli.backends.base import Draft, DraftRequest


@dataclass
class Run:
    """What one run gives; the lists have one entry a round."""

    output: list[int] = field(default_factory=list)
    drafts: list[np.ndarray] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)


def decode(case: Case, new_tokens: int, *, stops: frozenset[int] = frozenset(), threshold: float | None = None) -> Run:
    """Greedy speculative decoding as the reference does it (golden/NOTES 14-19)."""
    target, drafter, run = target_of(case), drafter_of(case), Run()
    ids = case.prompt
    limit = len(ids) + new_tokens
    logits, features = target(ids, case.layers)
    drafter.observe(0, ids, features)
    ids.append(int(logits[-1].argmax()))
    stopped = ids[-1] in stops
    while len(ids) - 1 < limit and not stopped:
        start = len(ids) - 1
        draft = drafter.propose([DraftRequest(0, ids[-1], drafter.block_size)])[0]
        run.drafts.append(draft.tokens)
        kept = proposal(draft, case.method, stops, threshold)
        logits, features = target([*ids, *kept], case.layers)
        best = logits[start:].argmax(1).tolist()
        accepted = next((i for i, token in enumerate(kept) if best[i] != token), len(kept))
        new = [*kept[:accepted], best[accepted]]
        stop_at = next((i for i, token in enumerate(kept[:accepted]) if token in stops), None)
        if stop_at is not None:  # a stop token among the drafts ends the round there, without a bonus token
            accepted = stop_at + 1
            new = kept = kept[:accepted]
        run.proposed.append(len(kept))
        run.accepted.append(accepted)
        run.committed.append(len(new))
        drafter.observe(0, [ids[-1], *kept[:accepted]], features[start : start + accepted + 1])
        ids += new
        stopped = new[-1] in stops
    run.output = ids[:limit]
    return run


def proposal(draft: Draft, method: str, stops: frozenset[int], threshold: float | None) -> list[int]:
    """The drafts that go to the target."""
    tokens = draft.tokens.tolist()
    if threshold is not None and draft.confidence is not None:
        tokens = tokens[: next((i for i, sure in enumerate(draft.confidence) if sure < threshold), len(tokens))]
    if method == "eagle3":  # the reference's Eagle3 stops drafting at a stop token
        tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))]
    return tokens


@lru_cache
def measured_run(case_name: str, kind: str) -> dict[str, Any]:
    """The tensors of one run; `kind` is the part of their names before the dot, "" for the main run."""
    case = next(case for case in all_cases() if case.name == case_name)
    given = {
        name.removeprefix(f"{kind}."): value for name, value in case.tensors.items() if name.startswith(f"{kind}.")
    }
    threshold = float(given["threshold"][0]) if "threshold" in given else None
    new_tokens = int(kind.removeprefix("short")) if kind.startswith("short") else case.settings["max_new_tokens"]
    stops = frozenset(given["stop_token_ids"].tolist()) if "stop_token_ids" in given else frozenset()
    run = decode(case, new_tokens, stops=stops, threshold=threshold)
    lists = {
        "acceptance_lengths": run.committed,
        "accepted_draft_lengths": run.accepted,
        "proposal_lengths": run.proposed,
    }
    if not kind:
        return {**lists, "all_draft_tokens": np.stack(run.drafts), "speculative_output_ids": [run.output]}
    found: dict[str, Any] = {f"{kind}.{name}": value for name, value in lists.items()}
    found[f"{kind}.output_ids"] = [run.output]
    settings = case.settings.get(kind, {})
    if threshold is not None:
        found[f"{kind}.threshold"] = np.asarray([settings["threshold"]], dtype=np.float32)
    if stops:
        found[f"{kind}.stop_token_ids"] = [settings["token"], *given["stop_token_ids"][1:].tolist()]
    return found


@pytest.mark.parametrize(("case", "name"), tensors("run"))
def test_run(case: Case, name: str) -> None:
    kind = name.rpartition(".")[0]
    assert_matches(name, measured_run(case.name, kind)[name], case.tensors[name])


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in all_cases()])
def test_speculation_does_not_change_the_text(case: Case) -> None:
    assert measured_run(case.name, "")["speculative_output_ids"] == case.tensors["target_greedy_output_ids"].tolist()
