"""Passes recorded as graphs: they give what eager ones give, whatever was cached, kept, forgotten or refused before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_device import ATOL, DEVICE, only_gpu, opened, torch

pytest.importorskip("transformers")

from dspark_cli.backends.base import Row
from dspark_cli.backends.torch import capture
from dspark_cli.backends.torch.target import TorchTarget
from test_torch_families import FAMILIES, PUBLISHED, check_passes, save_family
from tiny import tiny_checkpoint, tiny_config, tiny_model

Pair = tuple[TorchTarget, TorchTarget]


@pytest.fixture(scope="module")
def both(files: Path) -> Iterator[Pair]:
    """The tiny target, eager and recorded, on the device."""
    with opened(files / "target", recorded=False) as eager, opened(files / "target") as recorded:
        yield eager, recorded


def ragged_passes(targets: Sequence[TorchTarget], seed: int, count: int) -> Iterator[list[list[Any]]]:
    """What each target gives for the same passes, with rewinds, drops and forks between them."""
    random = np.random.default_rng(seed)
    n_vocab, n_seq = targets[0].info.n_vocab, targets[0].info.n_seq
    for target in targets:
        for seq in range(n_seq):
            target.drop(seq)
    for _ in range(count):
        rows = []
        chosen = random.choice(n_seq, size=random.integers(1, n_seq + 1), replace=False)
        source, destination = random.integers(0, n_seq, size=2).tolist()
        act = random.random()
        for target in targets:
            if act < 0.2:
                target.drop(destination)
            elif act < 0.5:
                target.fork(source, destination)
        for seq in chosen.tolist():
            width, back = int(random.integers(1, 40)), int(random.integers(0, 4))
            for target in targets:
                target.rewind(seq, max(0, target.length(seq) - back))
            if targets[0].length(seq) + width > targets[0].info.n_ctx:
                for target in targets:
                    target.drop(seq)
            rows.append(Row(seq, random.integers(0, n_vocab, size=width).tolist(), None if width % 3 else width // 2))
        yield [target.step(rows) for target in targets]
        lengths = [[target.length(seq) for seq in range(n_seq)] for target in targets]
        assert lengths == [lengths[0]] * len(targets)


def assert_alike(targets: Pair, seed: int, count: int) -> None:
    for eager, recorded in ragged_passes(targets, seed, count):
        for mine, plain in zip(recorded, eager, strict=True):
            np.testing.assert_allclose(mine.logits, plain.logits, atol=ATOL, rtol=1e-3)
            assert (mine.features is None) == (plain.features is None)
            if mine.features is not None:
                np.testing.assert_allclose(mine.features, plain.features, atol=ATOL, rtol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_recorded_passes_give_what_eager_ones_give(both: Pair, seed: int) -> None:
    """Other features with every seed: recordings are made anew. Key counts cross the borders of recorded sizes."""
    said: list[str] = []
    both[1]._notice = said.append
    for target in both:
        target.request_features([(-1, 0), (2,), (), (1, 3, 4)][seed])
    assert_alike(both, seed, 30)
    assert not said
    assert both[1]._recorder is not None
    assert len(both[1]._recorder._kept) > 3


def test_recordings_make_room_for_others(both: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than are kept: all are forgotten, and recording goes on in fresh memory."""
    monkeypatch.setattr(capture, "MOST", 3)
    for target in both:
        target.request_features((0,))
    assert_alike(both, 7, 25)
    assert both[1]._recorder is not None
    assert len(both[1]._recorder._kept) <= 3


def test_a_replay_reads_what_is_in_the_cache_now(both: Pair) -> None:
    """The same shape over another context: a recording that kept anything of its first run would repeat it."""
    for target in both:
        target.request_features(())
    found = []
    for context in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5]):
        for target in both:
            target.drop(1)
            target.step([Row(1, context, 0)])
        eager, recorded = (target.step([Row(1, [11, 12])])[0].logits for target in both)
        np.testing.assert_allclose(recorded, eager, atol=ATOL, rtol=1e-3)
        found.append(recorded)
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 100 * ATOL


@only_gpu
def test_another_thread_may_ask_the_device_meanwhile(files: Path) -> None:
    """A window shows free memory while an answer is made: that must not spoil a recording."""
    said: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            torch.cuda.mem_get_info()

    thread = threading.Thread(target=ask)
    with opened(files / "target", notice=said.append) as target:
        thread.start()
        try:
            for width in range(1, 17):
                target.step([Row(0, [width] * width)])
        finally:
            stop.set()
            thread.join()
        assert target._recorder is not None
    assert not said


@pytest.mark.parametrize("kind", [*FAMILIES, *PUBLISHED])
def test_families(kind: str, tmp_path: Path) -> None:
    """Every family, past its sliding windows, against transformers without a cache."""
    said: list[str] = []
    with opened(save_family(kind, tmp_path), ctx=None, n_seq=2, notice=said.append) as target:
        check_passes(target)
    assert not said or "moe" in kind, said


@pytest.mark.slow
@only_gpu
def test_compiled_passes_agree_with_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    said: list[str] = []
    folder = tiny_checkpoint(tmp_path / "one", tiny_model(tiny_config(num_hidden_layers=1)))
    with (
        opened(folder, recorded=False) as eager,
        opened(folder, recorded=False, capture="compile", notice=said.append) as target,
    ):
        for rows in ([Row(0, [7, 8, 9]), Row(2, [3])], [Row(0, [1, 2, 3]), Row(1, [4, 5, 6])], [Row(2, [1, 2, 3])]):
            for mine, plain in zip(target.step(rows), eager.step(rows), strict=True):
                np.testing.assert_allclose(mine.logits, plain.logits, atol=ATOL, rtol=1e-3)
    assert not said


@only_gpu
def test_a_model_that_waits_for_the_device_cannot_be_recorded(files: Path) -> None:
    """A layer that reads a number back, as routers of experts may: told once, and everything goes on eagerly.

    Nothing of the broken recording is left behind: the device computes, and the next target records.
    """
    said: list[str] = []

    def reads_back(module: Any, args: Any) -> None:
        float(args[0].sum())

    with opened(files / "target", recorded=False) as eager:
        with opened(files / "target", notice=said.append) as target:
            target.network.decoder_layers[2].register_forward_pre_hook(reads_back)
            for other in (target, eager):
                other.request_features((0,))
            assert_alike((eager, target), 3, 20)
            assert target._recorder is None
        assert len(said) == 1
        assert "cannot be recorded" in said[0]
        torch.cuda.synchronize()
        assert float(torch.ones(8, device=DEVICE).sum()) == 8
        with opened(files / "target", notice=said.append) as after:
            after.request_features((0,))
            assert_alike((eager, after), 3, 20)
            assert after._recorder is not None
    assert len(said) == 1
