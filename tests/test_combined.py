"""The combined drafter: what waits is handed over whole and once, in order, whatever is rewound or forked meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_cli.backends.base import Draft, Drafter, DraftRequest, FloatArray
from dspark_cli.backends.combined import WAITING, CombinedDrafter
from dspark_cli.backends.lookup import LookupDrafter


class Diary(Drafter):
    """Remembers what it was given; each token's feature must be the token itself."""

    name = kind = "diary"
    block_size = 4
    feature_layers = (3,)

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.calls = 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [Draft(np.full(r.block, r.anchor), source="diary") for r in requests]

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        assert features is not None
        assert features[:, 0].tolist() == list(tokens)
        self.calls += 1
        self.tokens.setdefault(seq, []).extend(tokens)

    def rewind(self, seq: int, length: int) -> None:
        assert length <= len(self.tokens.get(seq, [])) or length == 0, "rewound to where it never was"
        del self.tokens.setdefault(seq, [])[length:]

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.tokens[destination] = self.tokens.get(source, [])[:length]


def features(tokens: Sequence[int]) -> FloatArray:
    return np.asarray(tokens, dtype=np.float32)[:, None]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), st.lists(st.integers(0, 9), min_size=1, max_size=6)),
        st.tuples(st.just("rewind"), st.floats(0, 1)),
        st.tuples(st.just("propose"), st.just(None)),
        st.tuples(st.just("fork"), st.floats(0, 1)),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(steps, st.booleans())
def test_the_model_knows_exactly_what_is_committed_when_it_drafts(
    plan: list[tuple[str, object]], with_lookup: bool
) -> None:
    model, committed = Diary(), list[int]()
    lookup = LookupDrafter() if with_lookup else None
    drafter = CombinedDrafter(model, lookup)
    for what, value in plan:
        if what == "observe":
            scratch = features(value)  # type: ignore[arg-type]
            drafter.observe(0, value, scratch)  # type: ignore[arg-type]
            scratch[:] = -1.0  # the target's next pass overwrites what it lent
            committed += value  # type: ignore[arg-type]
        elif what == "rewind":
            length = int(value * len(committed))  # type: ignore[operator]
            drafter.rewind(0, length)
            del committed[length:]
        elif what == "fork":
            length = int(value * len(committed))  # type: ignore[operator]
            drafter.fork(0, 1, length)
            drafter.propose([DraftRequest(1, 5, 2)])
            assert model.tokens.get(1, []) == committed[:length]
        else:
            drafter.propose([DraftRequest(0, 5, 2)])
            assert model.tokens.get(0, []) == committed
        if lookup is not None:
            assert lookup._histories.get(0) is None or lookup._histories[0].tokens == committed
    drafter.propose([DraftRequest(0, 5, 2)])
    assert model.tokens.get(0, []) == committed


def test_a_fork_hands_nothing_over() -> None:
    """Prompts that share a beginning are forked for each answer: while the drafter is parked that must cost nothing."""
    model = Diary()
    drafter = CombinedDrafter(model)
    drafter.observe(0, [1, 2, 3], features([1, 2, 3]))
    drafter.fork(0, 1, 2)
    drafter.observe(1, [7], features([7]))
    assert model.calls == 0
    drafter.propose([DraftRequest(0, 5, 2), DraftRequest(1, 5, 2)])
    assert model.tokens == {0: [1, 2, 3], 1: [1, 2, 7]}


def test_a_new_wrapper_starts_from_an_empty_model() -> None:
    model = Diary()
    first = CombinedDrafter(model)
    first.observe(0, [1, 2], features([1, 2]))
    first.propose([DraftRequest(0, 5, 2)])
    second = CombinedDrafter(model)
    second.rewind(0, 0)
    second.observe(0, [7], features([7]))
    second.propose([DraftRequest(0, 5, 2)])
    assert model.tokens[0] == [7]


def test_many_rounds_are_one_hand_over() -> None:
    model = Diary()
    drafter = CombinedDrafter(model)
    for token in range(100):
        drafter.observe(0, [token], features([token]))
    assert model.calls == 0
    drafter.propose([DraftRequest(0, 1, 1)])
    assert model.calls == 1
    assert drafter.inject_ms > 0


def test_what_waits_is_bounded() -> None:
    model = Diary()
    drafter = CombinedDrafter(model)
    for token in range(WAITING + 10):
        drafter.observe(0, [token], features([token]))
    assert model.calls == 1
    assert len(model.tokens[0]) == WAITING


def test_lookup_learns_from_the_text_while_the_model_drafts() -> None:
    drafter = CombinedDrafter(Diary(), lookup := LookupDrafter())
    drafter.observe(0, [1, 2, 3, 1, 2], features([1, 2, 3, 1, 2]))
    seen = sum(lookup._histories[0].seen)
    assert drafter.quick([DraftRequest(0, 3, 4)])[0].tokens.tolist()[:2] == [1, 2]
    drafter.propose([DraftRequest(0, 3, 4)])
    drafter.observe(0, [3, 1], features([3, 1]))
    drafter.quick([DraftRequest(0, 9, 4)])  # 1, then 9: one token right, the next wrong
    assert sum(lookup._histories[0].seen) == seen + 2


def test_says_what_it_is() -> None:
    with_lookup, alone = CombinedDrafter(Diary(), LookupDrafter()), CombinedDrafter(Diary())
    assert (with_lookup.kind, with_lookup.name, with_lookup.block_size, with_lookup.pass_block) == (
        "diary",
        "diary + lookup",
        16,
        4,
    )
    assert (alone.name, alone.block_size, alone.feature_layers) == ("diary", 4, (3,))
    assert alone.quick([DraftRequest(0, 1, 4)])[0].tokens.size == 0


@pytest.mark.parametrize("block", [0, 3])
def test_a_drafter_without_a_pass_drafts_by_quick(block: int) -> None:
    lookup = LookupDrafter()
    lookup.observe(0, [1, 2, 3, 1, 2], None)
    assert not lookup.has_pass
    assert len(lookup.quick([DraftRequest(0, 3, block)])[0]) == block
