"""A small model as drafter: it follows what is committed, and reuses what it drafted."""

from __future__ import annotations

import numpy as np

from dspark_cli.backends.base import DraftRequest
from dspark_cli.backends.standalone import StandaloneDrafter, common_prefix
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request
from dspark_cli.engine.schedule import Fixed
from fakes import TableTarget


def greedy(model: TableTarget, text: list[int], count: int) -> list[int]:
    out = list(text)
    for _ in range(count):
        out.append(int(model.row(out).argmax()))
    return out[len(text) :]


def test_it_drafts_what_it_would_say_itself() -> None:
    model = TableTarget(5, seed=3, n_seq=2)
    drafter = StandaloneDrafter(model, n_vocab=5, block_size=4)
    drafter.observe(0, [0, 1, 2], None)
    drafter.observe(1, [4], None)
    first, second = drafter.propose([DraftRequest(0, 3, 4), DraftRequest(1, 1, 2)])
    assert first.tokens.tolist() == greedy(model, [0, 1, 2, 3], 4)
    assert second.tokens.tolist() == greedy(model, [4, 1], 2)


def test_accepted_drafts_need_no_second_pass() -> None:
    model = TableTarget(5, seed=3)
    drafter = StandaloneDrafter(model, n_vocab=5, block_size=3)
    drafter.observe(0, [0, 1], None)
    draft = drafter.propose([DraftRequest(0, 2, 3)])[0].tokens.tolist()
    drafter.observe(0, [2, *draft[:2]], None)  # two of three accepted
    before = model.computed
    again = drafter.propose([DraftRequest(0, 4, 1)])[0].tokens.tolist()
    assert again == greedy(model, [0, 1, 2, *draft[:2], 4], 1)
    assert model.computed - before == 1, "only the anchor was new"


def test_after_a_rejection_it_goes_on_from_what_was_committed() -> None:
    model = TableTarget(5, seed=3)
    drafter = StandaloneDrafter(model, n_vocab=5, block_size=3)
    drafter.observe(0, [0, 1], None)
    drafter.propose([DraftRequest(0, 2, 3)])
    drafter.observe(0, [2], None)
    assert drafter.propose([DraftRequest(0, 0, 3)])[0].tokens.tolist() == greedy(model, [0, 1, 2, 0], 3)
    drafter.rewind(0, 1)
    assert drafter.propose([DraftRequest(0, 4, 2)])[0].tokens.tolist() == greedy(model, [0, 4], 2)


def test_the_target_as_its_own_drafter_is_always_accepted() -> None:
    target = TableTarget(5, seed=3)
    drafter = StandaloneDrafter(TableTarget(5, seed=3), n_vocab=5, block_size=3)
    rounds = [r for r in Engine(target, drafter, Fixed(3)).run([Request([0], 25)]) if not r.is_prefill]
    assert all(r.accepted == r.verified for r in rounds)
    assert sum(r.accepted for r in rounds) > 15


def test_padded_vocabularies() -> None:
    for width, expected in ((3, 3), (7, 7)):
        drafter = StandaloneDrafter(TableTarget(5), n_vocab=width)
        row = drafter._to_target_width(np.arange(5, dtype=np.float32))
        assert row.shape == (expected,)
        assert np.isneginf(row[5:]).all()


def test_fork_shares_text_and_cache() -> None:
    model = TableTarget(5, seed=3, n_seq=2)
    drafter = StandaloneDrafter(model, n_vocab=5, block_size=2)
    drafter.observe(0, [0, 1, 2], None)
    drafter.propose([DraftRequest(0, 3, 2)])
    drafter.fork(0, 1, 2)
    assert drafter.propose([DraftRequest(1, 4, 2)])[0].tokens.tolist() == greedy(model, [0, 1, 4], 2)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2]) == 2
