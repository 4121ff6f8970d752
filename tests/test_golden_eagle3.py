"""Every recorded Eagle3 tensor: the reference's order of forwards and cache crops, replayed on our module.

Our drafter computes less (no attention while it extends the cache, no forward after the last draft); that it drafts
from the same numbers is tested at the end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from test_golden_cases import Case, all_cases, assert_matches, cases, drafter_of, target_of, tensors

torch = pytest.importorskip("torch")

from dspark_cli.backends.base import DraftRequest  # noqa: E402
from dspark_cli.backends.torch.layers import attention  # noqa: E402
from tests_support import whole_row  # noqa: E402


class Replay:
    """The module with a cache that is appended to at every forward, as the reference has it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None

    def __len__(self) -> int:
        return 0 if self.cache is None else self.cache[0].shape[1]

    def crop(self, length: int) -> None:
        self.cache = tuple(part[:, :length] for part in self.cache)

    @torch.inference_mode()
    def forward(self, ids: list[int], hidden: Any, positions: list[int], *, causal: bool) -> Any:
        """Pairs ids [L], hidden [1, L, d] at `positions` -> [1, L, d]."""
        mask = torch.ones(1, len(ids), len(ids), dtype=torch.bool).tril() if causal else None

        def attend(queries: Any, keys: Any, values: Any) -> Any:
            new = (keys, values)
            self.cache = new if self.cache is None else tuple(map(_append, self.cache, new))
            return attention(queries, *self.cache, self.model.layer.self_attn.scale, mask)

        rope = self.model.rotary(torch.tensor([positions]), max(positions))
        return self.model(torch.tensor([ids]), hidden, rope, attend)


def _append(old: Any, new: Any) -> Any:
    return torch.cat([old, new], dim=1)


@lru_cache
def measured_rounds(case_name: str) -> dict[str, Any]:
    case = next(case for case in all_cases() if case.name == case_name)
    target, model = target_of(case), drafter_of(case).model
    replay, ids = Replay(model), case.prompt
    logits, features = target(ids, case.layers)
    shifted = [*ids[1:], int(logits[-1].argmax())]
    hidden = replay.forward(shifted, _fused(model, features), list(range(len(ids))), causal=True)
    found: dict[str, Any] = {
        "prefill.target_features": features[None],
        "prefill.shifted_ids": [shifted],
        "prefill.position_ids": [list(range(len(ids)))],
        "prefill.draft_hidden_all": hidden,
        "prefill.draft_hidden": hidden[:, -1:],
    }
    hidden, anchor = hidden[:, -1:], shifted[-1]
    for r in range(sum(name.endswith(".start") for name in case.tensors)):
        start, before = len(ids), len(replay)
        found |= {f"round{r}.start": [start], f"round{r}.draft_hidden_in": hidden}
        steps = draft_steps(replay, hidden, start, case.settings["ttt_length"])
        verify = [anchor, *steps["draft_tokens"][0]]
        found |= {f"round{r}.{name}": value for name, value in steps.items()}
        found[f"round{r}.draft_cache_len_before"] = [before]
        found[f"round{r}.draft_cache_len_after_propose"] = [len(replay)]
        logits, features = target([*ids, *verify], case.layers)
        rows = logits[start:]
        wrong = np.flatnonzero(rows[:-1].argmax(1) != verify[1:])
        accepted = int(wrong[0]) if len(wrong) else len(verify) - 1
        committed = [*verify[1 : accepted + 1], int(rows[accepted].argmax())]
        update = features[start : start + accepted + 1]
        positions = list(range(start, start + accepted + 1))
        replay.crop(before)
        hidden = replay.forward(committed, _fused(model, update), positions, causal=False)[:, -1:]
        found |= {
            f"round{r}.verify_input_ids": [verify],
            f"round{r}.verify_position_ids": [list(range(start, start + len(verify)))],
            f"round{r}.verify_logits": rows[None],
            f"round{r}.accepted_count": [accepted],
            f"round{r}.next_token": committed[-1:],
            f"round{r}.committed_tokens": [committed],
            f"round{r}.update_target_features": update[None],
            f"round{r}.update_position_ids": [positions],
            f"round{r}.update_cache_crop_len": [before],
            f"round{r}.draft_cache_len_after_update": [len(replay)],
            f"round{r}.draft_hidden_out": hidden,
        }
        ids, anchor = [*ids, *verify[: accepted + 1]], committed[-1]
    return found


def _fused(model: Any, features: np.ndarray) -> Any:
    with torch.inference_mode():
        return model.fuse(torch.from_numpy(features)).unsqueeze(0)


def draft_steps(replay: Replay, hidden: Any, start: int, length: int) -> dict[str, Any]:
    """`length` greedy steps from hidden [1, 1, d]."""
    logits, hiddens, tokens, positions = [], [], [], []
    for k in range(length):
        with torch.inference_mode():
            row = replay.model.logits(hidden[:, 0])
        hiddens.append(hidden[0, 0].numpy())
        logits.append(row[0].numpy())
        tokens.append(int(row.argmax()))
        positions.append(start + k)
        hidden = replay.forward(tokens[-1:], hidden, positions[-1:], causal=False)
    return {
        "step_logits": np.stack(logits)[None],
        "step_hidden": np.stack(hiddens)[None],
        "step_position_ids": [positions],
        "draft_tokens": [tokens],
    }


@pytest.mark.parametrize(("case", "name"), tensors("round", "eagle3"))
def test_round(case: Case, name: str) -> None:
    assert_matches(name, measured_rounds(case.name)[name], case.tensors[name])


@pytest.mark.parametrize("case", cases("eagle3"))
def test_drafter_drafts_from_the_recorded_states(case: Case) -> None:
    """Through `observe` and `propose`: the states, logits, positions and cache lengths of every recorded round."""
    drafter, recorded, ids = drafter_of(case), case.tensors, case.prompt
    drafter.observe(0, ids, recorded["prefill.target_features"][0])
    for r in range(sum(name.endswith(".start") for name in recorded)):
        rows, states, positions = propose(drafter, int(recorded[f"round{r}.verify_input_ids"][0, 0]))
        assert drafter.length(0) == recorded[f"round{r}.start"][0]
        assert_matches("step_logits", rows[None], recorded[f"round{r}.step_logits"])
        assert_matches("step_hidden", states[None], recorded[f"round{r}.step_hidden"])
        start = int(recorded[f"round{r}.start"][0])
        assert positions == [start - 1, *recorded[f"round{r}.step_position_ids"][0, :-1].tolist()]
        committed = recorded[f"round{r}.verify_input_ids"][0, : recorded[f"round{r}.accepted_count"][0] + 1]
        drafter.observe(0, committed.tolist(), recorded[f"round{r}.update_target_features"][0])


def propose(drafter: Any, anchor: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Logits [T, V], states [T, d] and positions of the forwards of one greedy proposal."""
    rows: list[np.ndarray] = []
    states: list[np.ndarray] = []
    positions: list[int] = []

    def take_best(row: np.ndarray, drafted: list[int], ids: np.ndarray | None) -> tuple[int, np.ndarray]:
        rows.append(whole_row(row, ids, drafter.vocabulary.n_vocab))
        return int(rows[-1].argmax()), rows[-1]

    hooks = [
        drafter.model.register_forward_hook(lambda module, inputs, output: states.append(output[0, 0].numpy())),
        drafter.model.rotary.register_forward_hook(lambda module, inputs, output: positions.append(int(inputs[0]))),
    ]
    drafter.propose([DraftRequest(0, anchor, drafter.block_size, take_best)])
    for hook in hooks:
        hook.remove()
    return np.stack(rows), np.stack(states), positions
