"""The decode loop: greedy identity, limits, stops, cache reuse, several sequences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_cli.backends.base import BadInput, ContextFull, Drafter
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off, Threshold, parse_policy
from dspark_cli.engine.stats import Stats
from fakes import TableDrafter, TableTarget


def greedy(target: TableTarget, prompt: list[int], count: int) -> list[int]:
    """Plain greedy decoding, written without the engine."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(target.row(text).argmax()))
    return text[len(prompt) :]


def tokens_of(rounds: list[Round], request: int = 0) -> list[int]:
    return [t for r in rounds if r.request == request for t in r.tokens]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    length=st.integers(1, 30),
    block=st.integers(1, 6),
    policy=st.sampled_from(["fixed:1", "fixed:4", "threshold:0.3", "off", "auto"]),
    kind=st.sampled_from(["lookup", "table", "combined", "combined without lookup"]),
)
def test_greedy_output_equals_plain(
    seed: int, prompt: list[int], length: int, block: int, policy: str, kind: str
) -> None:
    target = TableTarget(5, seed=seed)
    model, lookup = TableDrafter(target, seed=seed + 1, block_size=block), LookupDrafter(block_size=block + 2)
    drafter: Drafter = {
        "lookup": lookup,
        "table": model,
        "combined": CombinedDrafter(model, lookup),
        "combined without lookup": CombinedDrafter(model),
    }[kind]
    rounds = list(Engine(target, drafter, parse_policy(policy)).run([Request(prompt, length)]))
    assert tokens_of(rounds) == greedy(target, prompt, length)
    stats = Stats()
    for item in rounds:
        stats.add(item)
    assert rounds[-1].finish == "length"
    assert stats.tokens == length
    assert not stats.rounds or 1 <= stats.accepted_length <= block + 3


def test_many_requests_share_the_passes_and_keep_their_own_text() -> None:
    target = TableTarget(5, seed=3, n_seq=3)
    requests = [Request([i % 5, (i * 2) % 5], 5 + i, id=i) for i in range(8)]
    rounds = list(Engine(target, TableDrafter(target), Fixed(3)).run(requests))
    for request in requests:
        assert tokens_of(rounds, request.id) == greedy(target, list(request.prompt), request.max_tokens or 0)
    assert max(r.shared for r in rounds) == 3


def test_a_continued_conversation_computes_only_what_is_new() -> None:
    target = TableTarget(5, seed=4)
    engine = Engine(target, TableDrafter(target), Fixed(3))
    first = tokens_of(list(engine.run([Request([0, 1, 2], 8)])))
    before = target.computed
    longer = [0, 1, 2, *first, 3, 3]
    rounds = list(engine.run([Request(longer, 4)]))
    assert rounds[0].cached >= 3 + len(first) - 1
    assert rounds[0].prefill_tokens == len(longer) - rounds[0].cached
    assert tokens_of(rounds) == greedy(target, longer, 4)
    assert target.computed - before < 4 * 5 + 4


def test_a_changed_conversation_is_computed_again_from_the_change() -> None:
    target = TableTarget(5, seed=4)
    engine = Engine(target, TableDrafter(target), Fixed(3))
    list(engine.run([Request([0, 1, 2, 3], 8)]))
    rounds = list(engine.run([Request([0, 1, 4, 3], 6)]))
    assert rounds[0].cached == 2
    assert tokens_of(rounds) == greedy(target, [0, 1, 4, 3], 6)


def test_a_run_left_in_the_middle_does_not_spoil_the_next() -> None:
    target = TableTarget(5, seed=5)
    engine = Engine(target, TableDrafter(target), Fixed(3))
    run = engine.run([Request([1, 2], 20)])
    for _ in range(3):
        next(run)
    run.close()
    assert tokens_of(list(engine.run([Request([1, 2], 12)]))) == greedy(target, [1, 2], 12)


def test_an_error_inside_a_pass_does_not_spoil_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TableTarget(5, seed=5)
    drafter = TableDrafter(target)
    engine = Engine(target, drafter, Fixed(3))
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "propose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(engine.run([Request([1, 2], 20)]))
    assert tokens_of(list(engine.run([Request([1, 2], 12)]))) == greedy(target, [1, 2], 12)


@pytest.mark.parametrize("position", range(1, 9))
def test_a_stop_token_ends_the_answer_wherever_it_falls_in_the_block(position: int) -> None:
    target = TableTarget(5, seed=9)
    plain = greedy(target, [0], 30)
    stop = plain[position]
    first = plain.index(stop)
    rounds = list(Engine(target, TableDrafter(target), Fixed(3)).run([Request([0], 30, stop_ids=frozenset({stop}))]))
    assert tokens_of(rounds) == plain[: first + 1]
    assert rounds[-1].finish == "stop"
    assert all(r.accepted <= len(r.tokens) for r in rounds)


def test_stop_strings_end_the_text_before_them() -> None:
    target = TableTarget(5, seed=9)
    text = target.tokenizer.decode(greedy(target, [0], 30))
    stop = text[7:10]
    rounds = list(Engine(target, TableDrafter(target), Fixed(3)).run([Request([0], 30, stop=(stop,))]))
    assert "".join(r.text for r in rounds) == text[: text.index(stop)]
    assert rounds[-1].finish == "stop"


def test_the_context_limit_is_used_to_the_last_position() -> None:
    target = TableTarget(5, seed=2, n_ctx=16)
    rounds = list(Engine(target, TableDrafter(target), Fixed(3)).run([Request([0, 1, 2], None)]))
    assert tokens_of(rounds) == greedy(target, [0, 1, 2], 13)
    assert rounds[-1].finish == "context"


def test_prompts_that_cannot_be_served_say_why() -> None:
    target = TableTarget(5, n_ctx=16)
    with pytest.raises(BadInput, match="empty"):
        list(Engine(target).run([Request([], 3)]))
    with pytest.raises(ContextFull, match=r"20 tokens.*holds 16"):
        list(Engine(target).run([Request([1] * 20, 3)]))


def test_margins_are_those_of_the_target() -> None:
    target = TableTarget(5, seed=1)
    rounds = list(Engine(target, margins=True).run([Request([0], 6)]))
    text = [0]
    for item in rounds:
        for token, margin in zip(item.tokens, item.margins or (), strict=True):
            second, first = sorted(target.row(text))[-2:]
            assert margin == pytest.approx(first - second, abs=1e-6)
            text.append(token)


def test_repetition_penalty_is_the_same_with_and_without_drafts() -> None:
    options = SamplingOptions(repeat_penalty=1.8)
    target = TableTarget(6, seed=8)
    plain = tokens_of(list(Engine(target).run([Request([0, 1], 24, options)])))
    drafted = tokens_of(list(Engine(target, TableDrafter(target), Fixed(3)).run([Request([0, 1], 24, options)])))
    assert drafted == plain != greedy(target, [0, 1], 24)


@pytest.mark.parametrize("text", ["nonsense", "auto:3", "fixed", "fixed:0", "fixed:x", "threshold:2", "off:3", ""])
def test_a_wrong_policy_says_what_is_allowed(text: str) -> None:
    with pytest.raises(BadInput, match="fixed:N"):
        parse_policy(text)


def test_policies_parse() -> None:
    assert isinstance(parse_policy("off"), Off)
    assert isinstance(parse_policy("auto"), AutoSchedule)
    assert parse_policy("fixed:4") == Fixed(4)
    assert parse_policy("threshold:0.4") == Threshold(0.4)


def test_stats_count_positions() -> None:
    stats = Stats()
    for verified, accepted in ((3, 3), (3, 1), (1, 0), (3, 0)):
        tokens = tuple(range(accepted + 1))
        stats.add(Round(0, tokens, drafted=3, verified=verified, accepted=accepted))
    assert stats.accepted_length == 2.0
    assert stats.survival == [2 / 4, 1 / 3, 1 / 3]
    assert stats.conditional == [2 / 4, 1 / 2, 1.0]
    assert stats.acceptance_rate == 4 / 10
