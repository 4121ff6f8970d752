"""Loading that is told of and can be cancelled, and another drafter or policy beside a loaded target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dspark_cli.backends.base import Draft, DraftRequest
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.profile import measure
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.registry import resolve
from fakes import TableTarget


class Enough(BaseException):
    """What the user's Escape raises inside loading."""


def test_a_file_load_tells_its_share_and_can_be_cancelled(embedded_gguf: Path) -> None:
    shares: list[float] = []
    LlamaCppTarget(embedded_gguf, progress=shares.append).close()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0

    def cancel(share: float) -> None:
        if share > 0.3:
            raise Enough

    with pytest.raises(Enough):
        LlamaCppTarget(embedded_gguf, progress=cancel)
    LlamaCppTarget(embedded_gguf).close()


def test_a_measurement_tells_its_share_and_leaves_nothing_behind_when_cancelled() -> None:
    target, shares = TableTarget(4, n_ctx=600), []

    def cancel(share: float) -> None:
        shares.append(share)
        if len(shares) == 5:
            raise Enough

    with pytest.raises(Enough):
        measure(target, None, seconds=5.0, progress=cancel)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert target.cache[0] == []


def test_a_pair_has_made_its_first_passes_when_it_is_loaded_and_holds_nothing(
    embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted: list[int] = []
    propose = LlamaCppDrafter.propose

    def counted(self: LlamaCppDrafter, requests: Sequence[DraftRequest]) -> list[Draft]:
        drafted.append(len(requests))
        return propose(self, requests)

    monkeypatch.setattr("dspark_cli.engine.session.costs_of", lambda *_: CostModel.unmeasured())  # known from earlier
    monkeypatch.setattr(LlamaCppDrafter, "propose", counted)
    own = resolve("smollm2-135m").drafter_path
    with Session.open(OpenOptions(embedded_gguf, "smollm2-135m", drafter_path=own, ctx=512)) as session:
        assert drafted == [1]
        assert isinstance(session.drafter, CombinedDrafter)
        assert isinstance(session.drafter.model, LlamaCppDrafter)
        assert session.target.length(0) == session.drafter.model.length(0) == 0


def test_switching_changes_drafter_and_policy_and_not_the_text(embedded_gguf: Path) -> None:
    loaded = OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", policy="fixed:3", ctx=512)
    with Session.open(loaded) as session:

        def ids() -> tuple[list[int], int]:
            request = session.text_request("1 2 3 4 1 2 3 4 1 2 3", max_tokens=24, sampling=SamplingOptions())
            rounds = list(session.run(request))
            return [token for item in rounds for token in item.tokens], sum(item.verified for item in rounds)

        drafted, verified = ids()
        assert verified > 0
        session.switch(OpenOptions(embedded_gguf, "smollm2-135m", drafter="none", policy="off"))
        assert session.drafter is None
        assert session.policy == "off"
        assert ids() == (drafted, 0)
        session.switch(OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", policy="threshold:0.1"))
        assert session.policy == "threshold:0.1"
        assert ids()[0] == drafted
        with pytest.raises(DsparkError, match="no eagle3 drafter is known"):
            session.switch(OpenOptions(embedded_gguf, "smollm2-135m", drafter="eagle3"))
        assert session.policy == "threshold:0.1"
        assert ids()[0] == drafted


def test_cancelling_the_measurement_of_a_switch_leaves_everything_as_it_was(embedded_gguf: Path) -> None:
    def cancel(stage: str, share: float) -> None:
        raise Enough

    with Session.open(
        OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", policy="fixed:3", ctx=512)
    ) as session:
        request = session.text_request("a b c d a b c", max_tokens=12, sampling=SamplingOptions())
        before = [token for item in session.run(request) for token in item.tokens]
        with pytest.raises(Enough):
            session.switch(OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", policy="auto", progress=cancel))
        assert session.policy == "fixed:3"
        assert [token for item in session.run(request) for token in item.tokens] == before


def test_reading_a_prompt_is_told_and_can_be_stopped(embedded_gguf: Path) -> None:
    with Session.open(
        OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", policy="fixed:2", ctx=2048)
    ) as session:
        request = session.text_request("word " * 700, max_tokens=4, sampling=SamplingOptions())
        told: list[tuple[int, int]] = []

        def stop(done: int, total: int) -> None:
            told.append((done, total))
            if done:
                raise Enough

        session.on_prefill(stop)
        with pytest.raises(Enough):
            list(session.run(request))
        assert told == [(0, len(request.prompt)), (512, len(request.prompt))]
        session.on_prefill(lambda done, total: None)
        first = list(session.run(request))
        assert first[0].cached == 0, "what was half read is not relied on"
        assert sum(len(item.tokens) for item in first) == 4
