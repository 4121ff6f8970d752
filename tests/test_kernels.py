"""The kernels' references against the recorded vectors, and the Triton kernels under the interpreter, in a process of its own.

TRITON_INTERPRET must be set before Triton is imported, and would change every kernel of this process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dspark_cli.kernels import dispatch  # noqa: E402
from dspark_cli.kernels.draws import draw  # noqa: E402
from dspark_cli.kernels.markov_step import markov_step  # noqa: E402
from dspark_cli.kernels.verify_draft import verify_draft  # noqa: E402
from kernel_cases import assert_drawn, assert_judged, assert_law, judged, step  # noqa: E402
from test_golden_cases import Case, cases  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.slow
def test_triton_kernels_equal_their_references_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    file = str(HERE / "cuda" / "test_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-rs", "-p", "no:cacheprovider", file, "-k", "not law"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "DSPARK_TEST_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "300",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=HERE.parent,
    )
    refused = re.search(r"SKIPPED.*: (the interpreter of .*)", done.stdout)
    if refused is not None and "passed" not in done.stdout:
        pytest.skip(refused.group(1))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 25
    assert "skipped" not in done.stdout


#: kernel -> (signature, sizes fixed at compile time); None = float32 pointers
COMPILED = {
    "markov_step_triton.correct": (
        "*bf16 *bf16 *bf16 *fp32 *fp32 *fp32 *i64 *fp32 i32 i32 i32 i32",
        {"BLOCK": 64, "RANK": 256, "GREEDY": 1e-5},
    ),
    "markov_step_triton.choose": (
        "*fp32 *fp32 *i64 *fp32 *fp32 *fp32 *i64 i32 i32",
        {"BLOCK": 64, "CHUNK": 1024, "GREEDY": 1e-5},
    ),
    "verify_draft_triton.summarize": ("*bf16 *fp32 *fp32 *i64 *fp32 i32 i32 i32", {"BLOCK": 2048, "GREEDY": 1e-5}),
    "verify_draft_triton.judge": (
        "*bf16 *fp32 *i64 *i64 *fp32 *fp32 *fp32 *i64 *fp32 *fp32 *fp32 *i64 *i64 i32 i32 i32",
        {"CHUNK": 128, "SAMPLED": True, "GREEDY": 1e-5, "TINY": 1e-8},
    ),
    "verify_draft_triton.leave": (
        "*bf16 *fp32 *i64 *i64 *fp32 *fp32 *fp32 *i64 *fp32 i32 i32 i32",
        {"BLOCK": 2048, "SAMPLED": True, "GREEDY": 1e-5, "TINY": 1e-8},
    ),
    "verify_draft_triton.finish": (
        "*bf16 *fp32 *i64 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 *fp32 *i64 i32 i32 i32",
        {"BLOCK": 2048, "CHUNK": 128, "SAMPLED": True, "GREEDY": 1e-5, "TINY": 1e-8},
    ),
}
CHIPS = {"cuda": [("cuda", 80, 32)], "rocm": [("hip", "gfx942", 64)]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHIPS)
def test_triton_kernels_compile_for_chips_that_are_not_here(kind: str, tmp_path: Path) -> None:
    """Down to machine code, without a GPU. It says that they compile, not that they were run."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), kind],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("bytes of machine code") == len(COMPILED) * len(CHIPS[kind])


def test_the_path_is_chosen_once_and_can_be_forced() -> None:
    assert dispatch.path_for(None, on_gpu=True) == "reference", "until a backend says otherwise"
    assert dispatch.path_for("triton", on_gpu=False) == "triton"
    with pytest.raises(ValueError, match="unknown path"):
        dispatch.use("metal")
    dispatch.use("triton")
    try:
        assert dispatch.path_for(None, on_gpu=True) == "triton"
        assert dispatch.path_for(None, on_gpu=False) == "reference", "a drafter on the CPU beside a target on the GPU"
        assert dispatch.path_for("reference", on_gpu=True) == "reference"
    finally:
        dispatch.use("reference")


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("heat", ["10", "07"])
def test_verification_accepts_what_was_recorded(case: Case, heat: str) -> None:
    recorded = case.tensors
    uniforms = torch.from_numpy(recorded["stoch.uniforms"])
    n, k = uniforms.shape
    # the recorded distributions as logits at temperature 1
    target = torch.from_numpy(recorded[f"stoch.t{heat}.target_probs"]).log().expand(n, -1, -1)
    draft_probs = torch.from_numpy(recorded[f"stoch.t{heat}.draft_probs"]).expand(n, -1, -1)
    tokens = torch.from_numpy(recorded["stoch.draft_tokens"]).expand(n, -1)
    last = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    uniform = torch.cat([uniforms.float(), last], dim=1)
    accepted, token = verify_draft(target, tokens, torch.full((n,), k), draft_probs, torch.ones(n), uniform)
    assert accepted.tolist() == recorded[f"stoch.t{heat}.accepted_counts"].tolist()
    residual = torch.from_numpy(recorded[f"stoch.t{heat}.residual_probs"])[0]
    for i, count in enumerate(accepted.tolist()):
        weights = residual[count] if count < k else target[i, k].exp()
        assert_drawn(weights, int(token[i]), float(last[i]))


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_of_verification_draws_what_it_should(sampled: bool, dtype: torch.dtype) -> None:
    counts = set()
    for seed in range(10):
        case = judged(6, 4, 997, sampled=sampled, dtype=dtype, seed=seed)
        accepted, token = verify_draft(*case.args())
        assert_judged(case, accepted, token, accepted)
        counts |= set(accepted.tolist())
    assert {0, 1, 2} <= counts, "the cases accept nothing"


def test_accepted_tokens_follow_the_targets_law() -> None:
    assert_law("cpu", "reference")


def test_the_reference_of_the_markov_step() -> None:
    case = step(4, 1000, 16)
    tokens, logits = markov_step(case.base, case.latent, case.w2, case.temperature, case.uniform)
    exact = case.base + case.latent @ case.w2.T
    torch.testing.assert_close(logits, exact, atol=1e-5, rtol=1e-5)
    assert int(tokens[0]) == int(exact[0].argmax())
    for i in (1, 2, 3):
        scaled = exact[i].double() / float(case.temperature[i])
        assert_drawn((scaled - scaled.max()).exp(), int(tokens[i]), float(case.uniform[i]))


@pytest.mark.parametrize("width", [1, 1023, 1024, 1025, 262_144])
def test_draws_at_block_borders(width: int) -> None:
    weights = torch.rand(4, width, generator=torch.Generator().manual_seed(width)) ** 20
    weights[:, -1] = torch.tensor([0.0, 1e-3, 0.0, 1.0]) if width > 1 else 1.0
    for uniform in (0.0, 0.25, 0.999, 1.0 - 2**-24):
        for row, token in zip(weights, draw(weights, torch.full((4,), uniform)).tolist(), strict=True):
            assert_drawn(row, token, uniform)
