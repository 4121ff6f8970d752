"""N-gram lookup: what it proposes, and how sure it says it is."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_cli.backends.base import Draft, DraftRequest
from dspark_cli.backends.lookup import ALONE, MAX_MATCH, LookupDrafter, _cells


def propose(drafter: LookupDrafter, anchor: int, block: int = 8, seq: int = 0) -> Draft:
    return drafter.propose([DraftRequest(seq, anchor, block)])[0]


def with_text(tokens: list[int], **options: int) -> LookupDrafter:
    drafter = LookupDrafter(**options)
    drafter.observe(0, tokens, None)
    return drafter


def test_it_continues_what_followed_the_same_words() -> None:
    drafter = with_text([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    assert propose(drafter, 3, 4).tokens.tolist() == [4, 5, 6, 7]
    assert len(propose(drafter, 8)) == 0, "2, 8 never occurred"


def test_the_longest_match_wins_over_the_latest() -> None:
    drafter = with_text([1, 2, 3, 4, 50, 9, 9, 3, 4, 60, 8, 8, 1, 2, 3])
    assert propose(drafter, 4, 1).tokens.tolist() == [50]


def test_the_latest_place_wins_among_equals() -> None:
    drafter = with_text([3, 4, 50, 9, 3, 4, 60, 8, 3])
    assert propose(drafter, 4, 1).tokens.tolist() == [60]


def test_a_short_period_goes_round() -> None:
    drafter = with_text([7, 1, 2, 1, 2, 1])
    assert propose(drafter, 2, 6).tokens.tolist() == [1, 2, 1, 2, 1, 2]


def test_block_size_and_request_limit_the_draft() -> None:
    text = [*range(40), 0]
    assert len(propose(with_text(text, block_size=5), 1, 30)) == 5
    assert len(propose(with_text(text), 1, 3)) == 3
    assert len(propose(with_text(text), 1, 0)) == 0


def test_confidence_grows_with_the_match() -> None:
    text = list(range(100, 130))
    short = propose(with_text([*text, 1, 2, 128 - 5]), 124, 1)
    long = propose(with_text([*text, *text[:20]]), text[20], 1)
    assert short.confidence is not None
    assert long.confidence is not None
    assert long.confidence[0] > short.confidence[0]


def test_two_places_that_go_on_alike_are_surer_than_one_and_two_that_do_not_are_unsure() -> None:
    once = with_text([3, 4, 50, 51, 9, 8, 3])
    twice = with_text([3, 4, 50, 51, 7, 3, 4, 50, 51, 9, 8, 3])
    apart = with_text([3, 4, 50, 60, 7, 3, 4, 50, 51, 9, 8, 3])
    sure = {name: propose(d, 4, 3).confidence for name, d in (("once", once), ("twice", twice), ("apart", apart))}
    assert all(c is not None and len(c) == 3 for c in sure.values())
    first, second, third = zip(*(c.tolist() for c in sure.values()), strict=True)  # type: ignore[union-attr]
    assert first[1] == first[2] > first[0]  # the first token is the same at both places
    assert second[1] > second[0] > second[2]  # the second parts them
    assert third[2] == third[0]  # if it was right nevertheless, the other place says no more


def test_the_place_before_the_latest_goes_round_as_the_latest_does() -> None:
    drafter = with_text([*[1, 2] * 6, 1])
    draft = propose(drafter, 2, 6)
    assert draft.tokens.tolist() == [1, 2, 1, 2, 1, 2]
    assert draft.confidence is not None
    assert draft.confidence.min() > 0.8, "both say the same all along"


def misled(drafter: LookupDrafter, times: int) -> list[int]:
    """A text in which every proposal after 1, 2 turns out wrong; the drafter stands before another 2."""
    text: list[int] = []
    for i in range(times):
        drafter.observe(0, [1], None)
        propose(drafter, 2, 1)
        drafter.observe(0, [2, 50 + i], None)
        text += [1, 2, 50 + i]
    drafter.observe(0, [1], None)
    return [*text, 1]


def test_what_was_learned_of_a_text_is_of_that_text() -> None:
    drafter = LookupDrafter()
    text = misled(drafter, 20)
    drafter.observe(1, text, None)  # the same, where nothing was proposed
    here, there = propose(drafter, 2, 1).confidence, propose(drafter, 2, 1, seq=1).confidence
    assert here is not None
    assert there is not None
    assert here[0] < 0.5 * there[0]
    drafter.rewind(0, len(text) - 1)  # goes on
    drafter.observe(0, [1], None)
    np.testing.assert_array_equal(propose(drafter, 2, 1).confidence, here)
    drafter.rewind(0, 0)  # another text
    drafter.observe(0, text, None)
    np.testing.assert_array_equal(propose(drafter, 2, 1).confidence, there)


@pytest.mark.parametrize("verified", [True, False])
def test_confidence_learns_from_the_text_that_came_up_to_the_first_difference(verified: bool) -> None:
    """Whether it came in one round, because it was verified, or token by token."""
    drafter = with_text([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    history = drafter._histories[0]
    kept, seen = history.kept.copy(), history.seen.copy()
    assert propose(drafter, 3, 4).tokens.tolist() == [4, 5, 6, 7]
    if verified:
        drafter.observe(0, [3, 4], None)
    else:
        drafter.observe(0, [3], None)
        assert propose(drafter, 4, 4).tokens.tolist() == [5, 6, 7, 8]
        drafter.observe(0, [4], None)
    propose(drafter, 99, 4)  # 4 was right, 5 was not, of 6 and 7 nothing is known
    first, second = _cells([ALONE, ALONE], 3)
    kept[first] += 1
    for where in (first, second):
        seen[where] += 1
    assert (history.kept, history.seen) == (kept, seen)


def test_a_proposal_that_nobody_followed_up_is_no_evidence() -> None:
    drafter = with_text([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    before = propose(drafter, 3, 4).confidence
    np.testing.assert_array_equal(propose(drafter, 3, 4).confidence, before)


def test_rewind_forgets() -> None:
    drafter = with_text([1, 2, 3, 4, 5, 1])
    assert propose(drafter, 2, 2).tokens.tolist() == [3, 4]
    drafter.rewind(0, 2)
    assert len(propose(drafter, 2)) == 0
    drafter.observe(0, [9, 1], None)
    assert propose(drafter, 2, 1).tokens.tolist() == [9]


def test_fork_and_sequences_are_apart() -> None:
    drafter = with_text([1, 2, 3, 4, 5, 1])
    drafter.fork(0, 1, 6)
    drafter.observe(1, [2, 8], None)
    drafter.observe(1, [1], None)
    assert propose(drafter, 2, 1, seq=1).tokens.tolist() == [8]
    assert propose(drafter, 2, 1, seq=0).tokens.tolist() == [3]


def test_very_long_matches_count_as_the_longest() -> None:
    text = list(range(MAX_MATCH * 3))
    draft = propose(with_text([*text, *text[: MAX_MATCH * 2]]), text[MAX_MATCH * 2], 4)
    assert draft.confidence is not None
    assert len(set(draft.confidence.tolist())) == 1
