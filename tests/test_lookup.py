"""N-gram lookup: what it proposes, and how sure it says it is."""

from __future__ import annotations

import numpy as np

from dspark_cli.backends.base import Draft, DraftRequest
from dspark_cli.backends.lookup import MAX_MATCH, LookupDrafter


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


def test_what_was_learned_of_a_text_is_of_that_text() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    drafter = with_text(text)
    drafter.observe(1, text, None)
    for _ in range(20):
        propose(drafter, 3, 4)
        drafter.feedback(0, 1, 0)
    here, there = propose(drafter, 3, 1).confidence, propose(drafter, 3, 1, seq=1).confidence
    assert here is not None
    assert there is not None
    assert here[0] < 0.3 < there[0]
    drafter.rewind(0, 10)  # goes on
    drafter.observe(0, [2], None)
    np.testing.assert_array_equal(propose(drafter, 3, 1).confidence, here)
    drafter.rewind(0, 0)  # another text
    drafter.observe(0, text, None)
    np.testing.assert_array_equal(propose(drafter, 3, 1).confidence, there)


def test_confidence_learns_from_what_was_verified_and_only_from_that() -> None:
    drafter = with_text([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    before = propose(drafter, 3, 4).confidence
    assert before is not None
    drafter.feedback(0, 0, 0)
    same = propose(drafter, 3, 4).confidence
    np.testing.assert_array_equal(before, same)
    for _ in range(10):
        propose(drafter, 3, 4)
        drafter.feedback(0, 2, 1)  # the first kept, the second refused, the rest never looked at
    after = propose(drafter, 3, 4).confidence
    assert after is not None
    assert after[0] > before[0]
    assert after[1] < before[1]
    np.testing.assert_array_equal(after[2:], before[2:])


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
