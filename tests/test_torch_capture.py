"""Recorded passes: padding to buckets changes nothing, and torch.compile agrees with eager.

Graphs need a GPU; what surrounds them (buckets, fixed buffers, absent sequences) runs here with a recording that repeats the
pass. Weights are float64, so only the steps that models do in float32 (norms, softmax) round; a wrong key, position or mask
changes logits of size 1 to 10 by a hundred times more than `ATOL`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch._dynamo.utils import counters  # noqa: E402

from dspark_cli.backends.base import Row  # noqa: E402
from dspark_cli.backends.torch import capture  # noqa: E402
from dspark_cli.backends.torch.capture import WIDTHS, Recorder, compiled, keys_bucket, recorder_for, width_bucket  # noqa: E402
from dspark_cli.backends.torch.devices import detect, pick  # noqa: E402
from dspark_cli.backends.torch.network import Network, PassOutput  # noqa: E402
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget  # noqa: E402
from fakes import FakeTokenizer  # noqa: E402
from tiny import N_VOCAB, tiny_config, tiny_model  # noqa: E402

N_SEQ, N_CTX = 3, 300
ATOL = 1e-3


def gemma_config(**changes: int) -> transformers.PretrainedConfig:
    """Sliding and full layers, and a cap on the logits of attention and head."""
    return transformers.Gemma2Config(
        vocab_size=N_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=7,
        max_position_embeddings=N_CTX,
        query_pre_attn_scalar=8,
        **changes,
    )


FAMILIES: dict[str, Callable[..., transformers.PretrainedConfig]] = {"llama": tiny_config, "gemma2": gemma_config}


def make_target(family: str, dtype: torch.dtype = torch.float64, **changes: int) -> TorchTarget:
    model = tiny_model(FAMILIES[family](**changes)).to(dtype)
    model.set_attn_implementation("dspark_grouped")
    options = TorchOptions(ctx=N_CTX, n_seq=N_SEQ, threads=1, capture="off")
    network = Network(model, family)
    facts = pick("cpu", detect())
    target = TorchTarget(
        network, FakeTokenizer(N_VOCAB), lambda messages, thinking: "", facts, options, name=family, path=""
    )
    target.request_features((-1, 0))
    return target


@lru_cache
def pair(family: str) -> tuple[TorchTarget, TorchTarget]:
    """The same model, eager and recorded."""
    recorded = make_target(family)
    recorded._recorder = Recorder(recorded.network, recorded.cache, N_SEQ, lambda run: run)
    return make_target(family), recorded


#: per pass: sequence -> (how far it is rewound first, width); the widest are not recorded
PASS = st.dictionaries(st.integers(0, N_SEQ - 1), st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1)


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(list(FAMILIES)), passes=st.lists(PASS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_padding_never_changes_a_result(family: str, passes: list[dict[int, tuple[int, int]]], seed: int) -> None:
    eager, recorded = pair(family)
    random = np.random.default_rng(seed)
    for target in (eager, recorded):
        for seq in range(N_SEQ):
            target.drop(seq)
    for wanted in passes:
        rows = []
        for seq, (back, width) in wanted.items():
            for target in (eager, recorded):
                target.rewind(seq, max(0, target.length(seq) - back))
            n_logits = None if width % 3 else width // 2
            rows.append(Row(seq, random.integers(0, N_VOCAB, size=width).tolist(), n_logits))
        for mine, plain in zip(recorded.step(rows), eager.step(rows), strict=True):
            np.testing.assert_allclose(mine.logits, plain.logits, atol=ATOL)
            assert mine.features is not None
            np.testing.assert_allclose(mine.features, plain.features, atol=ATOL)
        assert [recorded.length(seq) for seq in range(N_SEQ)] == [eager.length(seq) for seq in range(N_SEQ)]


def test_that_property_can_fail() -> None:
    """A padding column that is written where a real key will be read is noticed."""
    eager, recorded = pair("llama")
    for target in (eager, recorded):
        target.drop(0)
        target.step([Row(0, [1, 2, 3], 0)])
    recorded.cache.spare, spare = 1, recorded.cache.spare
    try:
        recorded.step([Row(0, [4] * 9, 0)])  # nine columns are padded to ten
    finally:
        recorded.cache.spare = spare
    eager.step([Row(0, [4] * 9, 0)])
    after = [target.step([Row(0, [5])])[0].logits for target in (eager, recorded)]
    assert np.abs(after[0] - after[1]).max() > 100 * ATOL


def test_buckets() -> None:
    assert [width_bucket(n) for n in (1, 7, 8, 9, 11, 13, 17, 32, 33)] == [1, 7, 8, 10, 12, 16, 24, 32, None]
    assert list(WIDTHS) == sorted(WIDTHS)
    assert [keys_bucket(n, 4096) for n in (1, 256, 257, 1000, 4096)] == [256, 256, 512, 1024, 4096]
    assert keys_bucket(1, 100) == 100


def test_what_is_kept_of_a_pass_may_change() -> None:
    """Recordings of passes with other features are not reused."""
    eager, recorded = pair("llama")
    for target in (eager, recorded):
        target.drop(0)
        target.request_features((3,))
    try:
        features = [target.step([Row(0, [1, 2, 3])])[0].features for target in (eager, recorded)]
        assert features[0] is not None
        assert features[1] is not None
        assert features[0].shape == features[1].shape
        np.testing.assert_allclose(features[0], features[1], atol=ATOL)
    finally:
        for target in (eager, recorded):
            target.request_features((-1, 0))


def test_a_pass_that_cannot_be_recorded_runs_eagerly() -> None:
    said: list[str] = []
    eager, recorded = make_target("llama"), make_target("llama")
    recorded._notice = said.append

    def refuse(run: Callable) -> Callable:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    recorded._recorder = Recorder(recorded.network, recorded.cache, N_SEQ, refuse)
    for _ in range(2):
        mine, plain = (target.step([Row(1, [3, 4, 5])])[0] for target in (recorded, eager))
        np.testing.assert_allclose(mine.logits, plain.logits, atol=ATOL)
    assert recorded.length(1) == 6
    assert said == [
        "passes of llama cannot be recorded (operation not permitted when stream is capturing): "
        "they run eagerly, more slowly"
    ]


class FakeCuda:
    """As much of torch.cuda as recording uses. A replay runs what was recorded again, into the tensors it gave then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.run: Callable = lambda: None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.log.append("new stream") or stream)
        monkeypatch.setattr(capture, "_recording_stream", lru_cache(capture._recording_stream.__wrapped__))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: self._block("side stream"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self._replay))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, **how: self._block(f"capture in {pool}"))

    @contextmanager
    def _block(self, name: str) -> Iterator[None]:
        self.log.append(name)
        yield
        self.log.append("end")

    def _replay(self) -> None:
        self.log.append("replay")
        fresh = self.run()
        self.output.logits.copy_(fresh.logits)
        self.output.features.copy_(fresh.features)

    def watch(self, run: Callable) -> Callable:
        """`run`, remembered with what it gave last outside a replay."""
        self.run = run

        def watched() -> PassOutput:
            self.log.append("run")
            self.output = run()
            return self.output

        return watched


def test_graphs_are_warmed_up_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, on a stand-in (tests/cuda runs the real ones). Targets that come later take the same stream."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    graphs = recorder_for("graph", torch.device("cpu"))
    eager, recorded = make_target("llama"), make_target("llama")
    recorded._recorder = Recorder(recorded.network, recorded.cache, N_SEQ, lambda run: graphs(fake.watch(run)))
    for tokens in ([3, 4, 5], [6, 7, 8]):
        mine, plain = (target.step([Row(1, tokens)])[0] for target in (recorded, eager))
        np.testing.assert_allclose(mine.logits, plain.logits, atol=ATOL)
        np.testing.assert_allclose(mine.features, plain.features, atol=ATOL)
    warm = ["wait", "side stream", "run", "run", "end", "wait"]
    assert fake.log == ["new stream", *warm, "capture in pool", "run", "end", "replay", "replay"]
    recorder_for("graph", torch.device("cpu"))
    assert fake.log.count("new stream") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_passes_agree_with_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    eager, recorded = (make_target("llama", torch.float32, num_hidden_layers=1) for _ in range(2))
    runs = []
    counters.clear()

    def record(run: Callable) -> Callable:
        runs.append(compiled(run))
        return runs[-1]

    recorded._recorder = Recorder(recorded.network, recorded.cache, N_SEQ, record)
    for rows in ([Row(0, [7, 8, 9]), Row(2, [3])], [Row(0, [1, 2, 3]), Row(1, [4, 5, 6])]):
        for mine, plain in zip(recorded.step(rows), eager.step(rows), strict=True):
            # float32: fused kernels sum in another order
            np.testing.assert_allclose(mine.logits, plain.logits, atol=ATOL)
            assert mine.features is not None
            np.testing.assert_allclose(mine.features, plain.features, atol=ATOL)
            assert (mine.logits.argmax(-1) == plain.logits.argmax(-1)).all()
    assert len(runs) == 1, "both passes have three columns: one recording"
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
