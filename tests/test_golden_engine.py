"""The recorded greedy runs again, through what users run: the torch target, the torch drafter and the engine.

The reference never shortens a block near the end, the engine drafts only what can still be committed: it gets room for two
blocks more, and its first rounds are compared.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from test_golden_cases import GOLDEN, Case, all_cases, assert_matches, cases, drafter_of, target_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_cli.backends.base import Row  # noqa: E402
from dspark_cli.backends.torch.devices import detect, pick  # noqa: E402
from dspark_cli.backends.torch.loading import load_model  # noqa: E402
from dspark_cli.backends.torch.network import Network  # noqa: E402
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget  # noqa: E402
from dspark_cli.engine.decode import Engine  # noqa: E402
from dspark_cli.engine.rounds import Request, Round  # noqa: E402
from dspark_cli.engine.schedule import Fixed, Schedule, Threshold  # noqa: E402
from fakes import FakeTokenizer  # noqa: E402


class IdTokenizer(FakeTokenizer):
    """The set has no tokenizer: token i is the text "i "."""

    def token_bytes(self, token: int) -> bytes:
        return f"{token} ".encode()


@lru_cache
def golden_target(name: str, n_seq: int = 1) -> TorchTarget:
    """A target of the set; it has no tokenizer."""
    folder = GOLDEN / name
    network = Network(load_model(folder, torch.float32, torch.device("cpu")), folder.name)
    options = TorchOptions(n_seq=n_seq, threads=1, capture="off")
    tokenizer = IdTokenizer(len(network.head))
    return TorchTarget(
        network,
        tokenizer,
        lambda messages, thinking: "",
        pick("cpu", detect()),
        options,
        name=folder.name,
        path=str(folder),
    )


def engine_rounds(case: Case, new_tokens: int, schedule: Schedule, stops: frozenset[int] = frozenset()) -> list[Round]:
    """The rounds of one greedy request, prefill first, with room for two blocks more than `new_tokens`."""
    target_of(case)  # skips where transformers has no such model
    target, drafter = golden_target(case.settings["target"]), drafter_of(case)
    target.drop(0)
    request = Request(case.prompt, new_tokens + 2 * (drafter.block_size + 1), stop_ids=stops)
    return list(Engine(target, drafter, schedule).run([request]))


def check(case: Case, rounds: list[Round], wanted: dict[str, Any], new_tokens: int) -> None:
    """Same tokens, and in every recorded round the same number of proposed, accepted and committed tokens."""
    drafted = [r for r in rounds if not r.is_prefill][: len(wanted["acceptance_lengths"])]
    tokens = [token for r in rounds for token in r.tokens]
    assert [*case.prompt, *tokens[:new_tokens]][: len(wanted["output_ids"])] == wanted["output_ids"]
    assert [len(r.tokens) for r in drafted] == wanted["acceptance_lengths"]
    if "accepted_draft_lengths" in wanted:
        assert [r.accepted for r in drafted] == wanted["accepted_draft_lengths"]
    if "proposal_lengths" in wanted:
        assert [r.verified for r in drafted] == wanted["proposal_lengths"]


@pytest.mark.parametrize("case", cases())
def test_the_recorded_prompt(case: Case) -> None:
    """Logits and features of the prompt, in one pass and in chunks; the draft reads these."""
    target_of(case)  # skips where transformers has no such model
    target, recorded = golden_target(case.settings["target"]), case.tensors
    for size in (len(case.prompt), 3):
        target.drop(0)
        target.request_features(case.layers)
        parts = [target.step([Row(0, case.prompt[i : i + size])])[0] for i in range(0, len(case.prompt), size)]
        logits, features = [p.logits for p in parts], [p.features for p in parts if p.features is not None]
        assert_matches("prompt_logits", np.concatenate(logits)[None], recorded["prompt_logits"])
        assert_matches("prompt_target_features", np.concatenate(features)[None], recorded["prompt_target_features"])


@pytest.mark.parametrize("case", cases())
def test_the_recorded_run(case: Case) -> None:
    recorded, new_tokens = case.tensors, case.settings["max_new_tokens"]
    names = ("acceptance_lengths", "accepted_draft_lengths", "proposal_lengths")
    wanted = {name: recorded[name].tolist() for name in names}
    wanted["output_ids"] = recorded["speculative_output_ids"][0].tolist()
    check(case, engine_rounds(case, new_tokens, Fixed(drafter_of(case).block_size)), wanted, new_tokens)


def runs(pattern: str) -> list[Any]:
    """Parameters (case, kind of run) for the recorded runs whose name begins with `pattern`."""
    return [
        pytest.param(case, name.partition(".")[0], id=f"{case.name}-{name.partition('.')[0]}")
        for case in all_cases()
        for name in case.tensors
        if name.startswith(pattern) and name.endswith(".output_ids")
    ]


@pytest.mark.parametrize(("case", "kind"), runs("stop_"))
def test_stop_tokens_end_it_where_they_did(case: Case, kind: str) -> None:
    recorded, new_tokens = case.tensors, case.settings["max_new_tokens"]
    stops = frozenset(recorded[f"{kind}.stop_token_ids"].tolist())
    rounds = engine_rounds(case, new_tokens, Fixed(drafter_of(case).block_size), stops)
    assert rounds[-1].finish == "stop"
    # What a round verified past the stop token is not recorded: the reference cuts its proposal there.
    wanted = {
        "output_ids": recorded[f"{kind}.output_ids"][0].tolist(),
        "acceptance_lengths": recorded[f"{kind}.acceptance_lengths"].tolist(),
    }
    check(case, rounds, wanted, new_tokens)


@pytest.mark.parametrize(("case", "kind"), runs("confidence_threshold"))
def test_thresholds_cut_where_they_did(case: Case, kind: str) -> None:
    recorded, new_tokens = case.tensors, case.settings["max_new_tokens"]
    names = ("acceptance_lengths", "accepted_draft_lengths", "proposal_lengths")
    wanted = {name: recorded[f"{kind}.{name}"].tolist() for name in names if f"{kind}.{name}" in recorded}
    wanted["output_ids"] = recorded[f"{kind}.output_ids"][0].tolist()
    rounds = engine_rounds(case, new_tokens, Threshold(float(recorded[f"{kind}.threshold"][0])))
    check(case, rounds, wanted, new_tokens)


@pytest.mark.parametrize("case", cases())
def test_several_requests_at_once_give_the_same(case: Case) -> None:
    """Ragged prompts and ragged rounds in shared passes: each request's text and accepted lengths are those it has alone."""
    target_of(case)
    target, drafter = golden_target(case.settings["target"], n_seq=3), drafter_of(case)
    for seq in range(3):
        target.drop(seq)
    requests = [Request(case.prompt[i:], 20 + 3 * i, id=i) for i in range(3)]
    together = list(Engine(target, drafter, Fixed(3)).run(requests))
    assert max(r.shared for r in together) == 3
    for request in requests:
        alone_target = golden_target(case.settings["target"])
        alone_target.drop(0)
        alone = list(Engine(alone_target, drafter_of(case), Fixed(3)).run([request]))
        mine = [r for r in together if r.request == request.id]
        assert [(r.tokens, r.accepted) for r in mine] == [(r.tokens, r.accepted) for r in alone]
