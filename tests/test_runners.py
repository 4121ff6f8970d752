"""Who runs a drafter beside a GGUF target: timed once for as many sequences as there are, kept, and asked again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import synthetic
from dspark_cli.backends.base import BadInput, DsparkError
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine import runners
from dspark_cli.engine.profile import SEVERAL
from dspark_cli.registry import resolve


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "d.gguf"
    path.write_bytes(b"drafter")
    return path


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Torch is quicker for several, libllama for one; the sequences of every comparison."""
    asked: list[int] = []

    def compare(path: Path, target: Any, options: ContextOptions) -> dict[str, float]:
        asked.append(target.info.n_seq)
        return {"llamacpp": 9.0 * target.info.n_seq, "torch": 12.0}

    monkeypatch.setenv("DSPARK_PROFILE_SECONDS", "4")
    monkeypatch.setattr(runners, "compare", compare)
    return asked


told: list[str] = []


def target(n_seq: int) -> Any:
    info = SimpleNamespace(n_seq=n_seq, details={"kernels": "ggml", "kv_type": "f16"}, n_vocab=1000, n_embd=100)
    return SimpleNamespace(info=info, context=SimpleNamespace(threads=2))


def chosen(path: Path, n_seq: int, spare: int | None = None) -> str:
    return runners._cheaper(path, target(n_seq), ContextOptions(n_seq=n_seq), told.append, spare)


def test_several_sequences_are_timed_once_and_not_one_for_the_other(path: Path, timed: list[int]) -> None:
    assert [chosen(path, n) for n in (4, 4, 2, 4)] == ["torch"] * 4
    assert timed == [4, 2]


def test_as_many_as_are_timed_together_or_more_are_one_case(path: Path, timed: list[int]) -> None:
    assert [chosen(path, n) for n in (SEVERAL, 64)] == ["torch"] * 2
    assert timed == [SEVERAL]


def test_the_user_hears_of_it_once(path: Path, timed: list[int]) -> None:
    told.clear()
    chosen(path, 4)
    chosen(path, 4)
    assert told == ["timing who drafts quicker for 4 sequences, llama.cpp or torch (once, a few seconds)"]


def test_one_sequence_is_timed_by_calibrate_only(path: Path, timed: list[int]) -> None:
    assert chosen(path, 1) == "llamacpp"
    assert timed == []
    runners.remember(path, target(1), {"llamacpp": 5.0, "torch": 2.0})
    assert chosen(path, 1) == "torch"


def test_torch_drafts_only_where_the_plan_leaves_it_room(path: Path, timed: list[int]) -> None:
    needs = runners.torch_bytes(path, target(4))
    assert needs == runners.TORCH_ITSELF + 4 * len(b"drafter") + 8 * 1000 * 100
    assert chosen(path, 4, needs - 1) == "llamacpp"
    assert timed == [], "what cannot be chosen is not timed"
    assert chosen(path, 4, needs) == "torch"


def test_another_drafter_in_its_place_is_timed_again(path: Path, timed: list[int]) -> None:
    chosen(path, 4)
    path.write_bytes(b"a better drafter")
    chosen(path, 4)
    assert timed == [4, 4]


def test_nobody_times_where_nothing_is_to_be_measured(
    path: Path, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_PROFILE_SECONDS", "0")
    assert chosen(path, 4) == "llamacpp"
    assert timed == []


def test_what_torch_cannot_open_libllama_runs(path: Path, timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, float]:
        raise DsparkError("a head that torch does not know")

    monkeypatch.setattr(runners, "compare", fails)
    assert chosen(path, 4) == "llamacpp"


def test_unknown_runner(path: Path) -> None:
    with pytest.raises(BadInput, match="one of auto, llamacpp, torch"):
        runners.open_block_drafter(path, target(1), ContextOptions(), "cuda")


def test_both_are_timed_with_all_sequences_and_leave_the_target_empty() -> None:
    drafter = resolve("smollm2-135m").drafter_path
    assert drafter is not None
    options = ContextOptions(ctx=256, n_seq=3, threads=1)
    with LlamaCppTarget(synthetic.target_path(), options) as opened:
        times = runners.compare(drafter, opened, options)
        assert set(times) == {"llamacpp", "torch"}
        assert min(times.values()) > 0
        assert [opened.length(seq) for seq in range(3)] == [0, 0, 0]
