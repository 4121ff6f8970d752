"""Our kernels against libllama on the same drafter, and which drafters are left to libllama."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drafters import OPTIONS

import synthetic
from dspark_cli.backends.base import ContextFull, DraftRequest, FloatArray
from dspark_cli.backends.llamacpp import passes
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter, facts_of
from dspark_cli.backends.llamacpp.header import Header, read_header
from dspark_cli.backends.llamacpp.passes import DraftRows, KernelPass, LibllamaPass
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.pairing import DrafterFacts, check_gguf
from dspark_cli.kernels import cpu_drafter
from dspark_cli.registry import resolve

pytestmark = pytest.mark.skipif(cpu_drafter.unfit() is not None, reason=f"no kernels here: {cpu_drafter.unfit()}")

SHIPPED = resolve("smollm2-135m").drafter_path


@pytest.fixture(scope="module")
def shipped(target: LlamaCppTarget) -> Iterator[tuple[LlamaCppDrafter, LlamaCppDrafter]]:
    """The drafter that ships, by our kernels and by libllama. Its features are others than the synthetic ones'."""
    assert SHIPPED is not None
    with (
        LlamaCppDrafter(SHIPPED, target, OPTIONS) as ours,
        LlamaCppDrafter(SHIPPED, target, OPTIONS, kernels=False) as its,
    ):
        assert isinstance(ours.passes, KernelPass)
        assert isinstance(its.passes, LibllamaPass)
        yield ours, its


def block(drafter: LlamaCppDrafter, seqs: list[int], anchor: int, rows: int) -> DraftRows:
    def choose(*_: object) -> None:
        raise AssertionError

    assert drafter.passes is not None
    requests = [DraftRequest(seq, anchor, rows, choose) for seq in seqs]  # rows of the draft vocabulary from both
    found = drafter.passes.block(requests, rows, 2)
    return DraftRows(found.logits.copy(), found.ids, found.greedy.copy(), found.confidence)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 150])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_shipped_drafter_says_the_same(
    shipped: tuple[LlamaCppDrafter, LlamaCppDrafter], length: int, rows: int
) -> None:
    """Q5_0, Q8_0 and Q5_1 weights. Activations are rounded to 8 bits before every product: what differs in the last bits (keys
    and values in F16 here) is rounded otherwise here and there, some hundredths of a logit's spread in the end."""
    features = np.random.default_rng(length).standard_normal((length, 5 * synthetic.HIDDEN)).astype(np.float32)
    found = []
    for drafter in shipped:
        drafter.observe(1, list(range(length)), features)
        found.append(block(drafter, [1], 1000, rows))
        drafter.drop(1)
    ours, its = found
    assert ours.ids is not None
    assert ours.confidence is not None
    assert its.confidence is not None
    assert np.array_equal(ours.ids, its.ids)  # type: ignore[arg-type]
    for k in range(rows):
        assert np.corrcoef(ours.logits[k], its.logits[k])[0, 1] > 0.998
        assert ours.confidence[k] == pytest.approx(its.confidence[k], abs=0.03)
        assert ours.greedy[k] == ours.ids[ours.logits[k].argmax()]
        if ours.greedy[k] != its.greedy[k]:  # a near-tie; what follows is corrected along another token
            assert its.logits[k].max() - its.logits[k][ours.logits[k].argmax()] < 0.2 * its.logits[k].std()
            break


def test_threads_do_not_matter(target: LlamaCppTarget, reduced: Path, ids: list[int], features: FloatArray) -> None:
    found = []
    for threads in (1, 2, 3):
        with LlamaCppDrafter(reduced, target, replace(OPTIONS, threads=threads)) as drafter:
            drafter.observe(0, ids, features)
            found.append(block(drafter, [0], 1000, 5))
    for other in found[1:]:
        assert np.array_equal(found[0].logits, other.logits)
        assert found[0].greedy.tolist() == other.greedy.tolist()
        assert np.array_equal(found[0].confidence, other.confidence)  # type: ignore[arg-type]


def test_fewer_threads_than_were_asked_for(reduced: Path) -> None:
    """OpenMP may give fewer: every row must still be computed."""
    script = (
        "import sys, numpy as np, synthetic\n"
        "from drafters import OPTIONS, propose\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter\n"
        "from dspark_cli.backends.llamacpp.target import LlamaCppTarget\n"
        "options = replace(OPTIONS, threads=3)\n"
        "target = LlamaCppTarget(synthetic.target_path(), options)\n"
        "drafter = LlamaCppDrafter(Path(sys.argv[1]), target, options)\n"
        "rng = np.random.default_rng(0)\n"
        "drafter.observe(0, list(range(9)), rng.standard_normal((9, 3 * synthetic.HIDDEN)).astype(np.float32))\n"
        "draft = propose(drafter, 1000)\n"
        "print(type(drafter.passes).__name__, draft.tokens.tolist(), draft.confidence.tolist())\n"
    )
    folders = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))
    said = [
        subprocess.run(
            [sys.executable, "-c", script, str(reduced)],
            env={**os.environ, "PYTHONPATH": folders, "OMP_THREAD_LIMIT": limit},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for limit in ("8", "2")
    ]
    assert said[0].startswith("KernelPass [")
    assert said[0] == said[1]


def test_features_of_another_width(target: LlamaCppTarget, reduced: Path) -> None:
    with (
        LlamaCppDrafter(reduced, target, OPTIONS) as drafter,
        pytest.raises(ValueError, match=r"features of shape \(2, 7\)"),
    ):
        drafter.observe(0, [1, 2], np.zeros((2, 7), np.float32))


def test_sequences_do_not_see_one_another(
    target: LlamaCppTarget, reduced: Path, ids: list[int], features: FloatArray
) -> None:
    with LlamaCppDrafter(reduced, target, OPTIONS) as drafter:
        for seq, length in enumerate((5, 20, 11)):
            drafter.observe(seq, ids[:length], features[:length])
        together = block(drafter, [2, 0, 1], 1000, 5)
        for at, seq in enumerate((2, 0, 1)):
            alone, rows = block(drafter, [seq], 1000, 5), slice(5 * at, 5 * at + 5)
            assert alone.greedy.tolist() == together.greedy[rows].tolist()
            np.testing.assert_allclose(alone.logits, together.logits[rows], atol=1e-4)


def test_a_context_that_is_full(target: LlamaCppTarget, reduced: Path) -> None:
    with LlamaCppDrafter(reduced, target, OPTIONS) as drafter:
        room = target.info.n_ctx + drafter.block_size
        drafter.observe(0, [1] * room, np.zeros((room, 3 * synthetic.HIDDEN), np.float32))
        with pytest.raises(ContextFull, match=f"no room for token {room + 1} in a drafter's context of {room}"):
            drafter.observe(0, [1], np.zeros((1, 3 * synthetic.HIDDEN), np.float32))
        assert drafter.length(0) == room
        drafter.drop(0)
        assert drafter.length(0) == 0


@pytest.mark.parametrize(
    "options",
    [replace(OPTIONS, kv_type="q8_0", flash_attn="on"), ContextOptions(ctx=1400, n_seq=3)],
    ids=["quantized keys and values", "without kernels"],
)
def test_what_is_left_to_libllama(
    target: LlamaCppTarget, reduced: Path, options: ContextOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.kv_type == "f16":
        monkeypatch.setattr(cpu_drafter, "unfit", lambda: "DSPARK_CPU_KERNELS=off")
    with LlamaCppDrafter(reduced, target, options) as drafter:
        assert isinstance(drafter.passes, LibllamaPass)


def with_tensor(header: Header) -> Header:
    return replace(header, tensors={**header.tensors, "rope_freqs.weight": header.tensors["output_norm.weight"]})


def with_value(key: str, value: object) -> Callable[[Header], Header]:
    return lambda header: replace(header, metadata={**header.metadata, key: value})


@pytest.mark.parametrize(
    ("of", "change"),
    [
        pytest.param("drafter", with_tensor, id="a tensor"),
        pytest.param("drafter", with_value("dflash.rope.scaling.type", "yarn"), id="scaled RoPE"),
        pytest.param("drafter", with_value("dflash.attention.sliding_window", 512), id="a window"),
        pytest.param("drafter", with_value("dflash.rope.dimension_count", 16), id="half a head turned"),
        pytest.param("drafter", with_value("dflash.attention.head_count", 3), id="heads that share nothing"),
        pytest.param("drafter", with_value("dflash.feed_forward_length", 64), id="another shape"),
        pytest.param("drafter", with_value("dflash.feed_forward_length", [128, 128]), id="a shape for each layer"),
        pytest.param("drafter", with_value("dflash.hidden_activation", "gelu"), id="another activation"),
        pytest.param("drafter", with_value("dflash.final_logit_softcapping", 30.0), id="capped logits"),
        pytest.param("target", with_value("llama.embedding_scale", 12.0), id="a scaled embedding"),
        pytest.param("target", with_value("general.architecture", "gemma3"), id="a family that scales it"),
        pytest.param("target", with_value("split.count", 3), id="a file in parts"),
    ],
)
def test_what_the_kernels_do_not_know_is_left_to_libllama(
    target: LlamaCppTarget,
    reduced: Path,
    of: str,
    change: Callable[[Header], Header],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts, d2t = facts_for(target, reduced), np.arange(4000)
    assert passes.by_kernels(reduced, target, facts, OPTIONS, d2t) is not None
    changed = reduced if of == "drafter" else target.model.path
    monkeypatch.setattr(
        passes, "read_header", lambda path: change(read_header(path)) if path == changed else read_header(path)
    )
    assert passes.by_kernels(reduced, target, facts, OPTIONS, d2t) is None


def facts_for(target: LlamaCppTarget, path: Path) -> DrafterFacts:
    return check_gguf(path, facts_of(target.model))


def test_ids_outside_the_vocabulary_are_not_followed(target: LlamaCppTarget, reduced: Path) -> None:
    facts = facts_for(target, reduced)
    for wrong in (np.arange(4000) + target.info.n_vocab - 3999, np.arange(4000) - 1, np.arange(3999)):
        assert passes.by_kernels(reduced, target, facts, OPTIONS, wrong) is None
