"""Continuous batching in the decode loop: shared prefixes, prompts mixed into decode passes, refilled slots, failures apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_cli.backends.base import ContextFull, Drafter, Row, RowOutput
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.engine import decode, slots
from dspark_cli.engine.decode import Engine, margins
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.schedule import Fixed, parse_policy
from fakes import TableDrafter, TableTarget


class Recording(TableTarget):
    """Remembers the rows of every pass."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.passes: list[list[Row]] = []

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        self.passes.append(list(rows))
        return super().step(rows)


def alone(target: TableTarget, request: Request) -> list[int]:
    """The answer of `request` in an engine of its own, without drafts."""
    own = TableTarget(target.info.n_vocab, n_ctx=target.info.n_ctx)
    own.table = target.table
    return [t for r in Engine(own).run([request]) for t in r.tokens]


def answers(rounds: list[Round]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for item in rounds:
        found.setdefault(item.request, []).extend(item.tokens)
    return found


def prompts(count: int, prefix: int, own: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    head = random.integers(0, 5, prefix).tolist()
    return [head + random.integers(0, 5, own).tolist() for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n_seq=st.integers(1, 5),
    prefix=st.integers(0, 30),
    own=st.integers(1, 25),
    temperature=st.sampled_from([0.0, 1.0]),
    policy=st.sampled_from(["off", "fixed:3", "auto"]),
    kind=st.sampled_from(["table", "lookup", "combined"]),
)
def test_every_answer_is_that_of_the_request_alone(
    seed: int, n_seq: int, prefix: int, own: int, temperature: float, policy: str, kind: str
) -> None:
    """Whatever the neighbours, the order and what is shared: the table target has no rounding, so texts are equal."""
    target = TableTarget(5, seed=seed, n_seq=n_seq)
    model, lookup = TableDrafter(target, seed=seed + 1), LookupDrafter()
    drafter: Drafter = {"table": model, "lookup": lookup, "combined": CombinedDrafter(model, lookup)}[kind]
    requests = [
        Request(prompt, 3 + (i * 7) % 9, SamplingOptions(temperature=temperature, seed=i), id=i)
        for i, prompt in enumerate(prompts(9, prefix, own, seed))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decode.BESIDE, "cpu", 4)  # prompts in small chunks, beside decoding ones
        rounds = list(Engine(target, drafter, parse_policy(policy)).run(requests))
    assert answers(rounds) == {r.id: alone(target, r) for r in requests}


def test_a_shared_prefix_is_computed_once() -> None:
    target = TableTarget(5, n_seq=4, n_ctx=1100)
    target.max_rows = 512
    made = [Request(p, 4, id=i) for i, p in enumerate(prompts(12, 1000, 10))]
    rounds = list(Engine(target, TableDrafter(target), Fixed(3)).run(made))
    computed = sum(r.prefill_tokens or 0 for r in rounds)
    cached = sum(r.cached for r in rounds)
    assert computed + cached == 12 * 1010
    assert 1000 + 12 * 5 < computed <= 1000 + 12 * 10
    assert answers(rounds) == {r.id: alone(target, r) for r in made}


def test_without_sharing_it_would_be_computed_twelve_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure above measures sharing: with it switched off, work is all of it."""
    monkeypatch.setattr(slots, "shared", lambda held, prompt: 0)
    target = TableTarget(5, n_seq=4, n_ctx=1100)
    target.max_rows = 512
    rounds = list(Engine(target).run([Request(p, 4, id=i) for i, p in enumerate(prompts(12, 1000, 10))]))
    assert sum(r.prefill_tokens or 0 for r in rounds) == 12 * 1010


def test_decoding_goes_on_while_a_long_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode.BESIDE, "cpu", 10)
    target = Recording(5, n_seq=2, n_ctx=400)
    requests = [Request([0, 1], 60, id=0), Request([2, 2], 3, id=1), Request([3] * 200, 5, id=2)]
    list(Engine(target).run(requests))
    mixed = [rows for rows in target.passes if any(len(row.tokens) == 10 for row in rows)]
    assert len(mixed) == 20
    assert all(len(rows) == 2 and min(len(row.tokens) for row in rows) == 1 for rows in mixed)


def test_a_finished_sequence_is_refilled_in_the_next_pass() -> None:
    target = Recording(5, n_seq=3)
    list(Engine(target).run([Request([i % 5, 1], 2 + i % 4, id=i) for i in range(20)]))
    assert all(len(rows) == 3 for rows in target.passes[:-6])
    assert len(target.passes) > 20


def test_requests_are_taken_only_when_a_sequence_is_free() -> None:
    """Ten thousand items are never all in memory."""
    taken: list[int] = []

    def many() -> object:
        for i in range(10):
            taken.append(i)
            yield Request([0, 1], 4, id=i)

    run = Engine(TableTarget(5, n_seq=2)).run(many())  # type: ignore[arg-type]
    next(run)
    assert taken == [0, 1]
    run.close()


def test_a_request_that_cannot_be_served_does_not_end_the_others() -> None:
    target = TableTarget(5, n_ctx=16, n_seq=2)
    requests = [Request([0], 4, id=0), Request([1] * 20, 4, id=1), Request([], 4, id=2), Request([2], 4, id=3)]
    rounds = list(Engine(target).run(requests, isolate=True))
    failed = {r.request: r.error for r in rounds if r.finish == "error"}
    assert set(failed) == {1, 2}
    assert isinstance(failed[1], ContextFull)
    assert "20 tokens, the context holds 16" in str(failed[1])
    assert {r.request for r in rounds if r.finish == "length"} == {0, 3}
    with pytest.raises(ContextFull):
        list(Engine(target).run(requests))


def test_a_run_left_while_prompts_share_does_not_spoil_the_next() -> None:
    target = TableTarget(5, n_seq=3, n_ctx=200)
    engine = Engine(target, TableDrafter(target), Fixed(3))
    made = [Request(p, 8, id=i) for i, p in enumerate(prompts(6, 100, 5))]
    for stop in range(1, 12):
        run = engine.run(made)
        for _ in range(stop):
            next(run)
        run.close()
        assert answers(list(engine.run(made))) == {r.id: alone(target, r) for r in made}


def test_times_of_mixed_passes_add_up() -> None:
    """What rounds and prompts were charged is what the passes took, however they were mixed."""
    now = [0.0]

    class Slow(TableTarget):
        def step(self, rows: Sequence[Row]) -> list[RowOutput]:
            now[0] += 0.010
            self.native_ms += 10.0
            return super().step(rows)

    target = Slow(5, n_seq=3, n_ctx=200)
    rounds = list(Engine(target, clock=lambda: now[0]).run([Request([i % 5] * 30, 3 + i, id=i) for i in range(7)]))
    charged = sum(r.times.total / (1 if r.is_prefill else r.shared) for r in rounds)
    assert charged == pytest.approx(target.native_ms)


def test_margins_of_rows() -> None:
    rows = np.asarray([[1.0, 5.0, 4.5, -2.0], [7.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 2.0]], dtype=np.float32)
    assert margins(rows) == (0.5, 4.0, 0.0)
