"""The Triton kernels against their references: as machine code on a GPU, and interpreted (run by tests/test_kernels.py).

Counts and greedy tokens must be equal. Logits may differ by rounding (another order of r products); a drawn token must be the
one that its uniform number means, up to the rounding of a sum over the vocabulary.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest
from cuda_device import DEVICE, INTERPRETED, ON_GPU, PATH, on_device, torch

if PATH == "triton":
    pytest.importorskip("triton", reason="triton is not installed")

from dspark_cli.kernels.markov_step import markov_step
from dspark_cli.kernels.markov_step import reference as step_reference
from dspark_cli.kernels.verify_draft import reference as verify_reference
from dspark_cli.kernels.verify_draft import verify_draft
from kernel_cases import Judged, Step, assert_drawn, assert_judged, assert_law, judged, step

INF = float("inf")

if INTERPRETED:  # which needs Python's time for each program: fewer and narrower cases
    import triton
    from triton.runtime.errors import InterpreterError

    from dspark_cli.kernels import markov_step_triton

    @triton.jit
    def count(n):
        for _ in range(n):
            pass

    try:
        count[(1,)](2)
    except InterpreterError as error:
        versions = f"triton {version('triton')} does not run with numpy {np.__version__}"
        pytest.skip(f"the interpreter of {versions}: {error}", allow_module_level=True)

STEPS = [(1, 1, 1), (3, 63, 4), (4, 65, 16), (5, 1000, 33), (2, 4097, 256)]
WIDE_STEPS = [(2, 151_936, 4), (2, 262_144, 4)] if INTERPRETED else [(8, 151_936, 256), (1, 262_144, 256)]
HALF_STEPS = [(4, 3000, 64)] if INTERPRETED else [(4, 3000, 256), (1, 151_936, 256), (8, 151_936, 256)]
VERIFIED = [(1, 1, 2), (5, 3, 7), (4, 5, 2049), (2, 7, 5000), (3, 0, 50), *([] if INTERPRETED else [(8, 7, 9)])]


def test_what_is_tested_is_what_runs() -> None:
    assert ("triton" if ON_GPU or INTERPRETED else "reference") == PATH
    if PATH == "triton":
        from dspark_cli.kernels.markov_step_triton import correct

        assert type(correct).__name__ == ("InterpretedFunction" if INTERPRETED else "JITFunction")


def check_step(case: Step, *, greedy: bool = False, atol: float = 1e-4) -> None:
    there = on_device(case)
    heat, uniform = (None, None) if greedy else (there.temperature, there.uniform)
    tokens, logits = markov_step(there.base, there.latent, there.w2, heat, uniform, path=PATH)
    wanted, corrected = step_reference(there.base, there.latent, there.w2, heat, uniform)
    assert logits.dtype == corrected.dtype
    torch.testing.assert_close(logits, corrected, atol=atol, rtol=atol)
    if PATH == "reference" and case.base.dtype != torch.float32:
        return  # it chooses by logits that were rounded twice; the kernel by a float32 sum
    exact = case.base.double() + case.latent.double() @ case.w2.double().T
    for i, token in enumerate(tokens.tolist()):
        if not greedy and float(case.temperature[i]) > 0:
            scaled = exact[i] / float(case.temperature[i])
            assert_drawn((scaled - scaled.max()).exp(), token, float(case.uniform[i]))
        elif case.base.dtype == torch.float32:
            assert token == int(exact[i].argmax()) == int(wanted[i])
        else:
            assert float(exact[i].max() - exact[i, token]) < 1e-3


@pytest.mark.parametrize(("n", "width", "rank"), [*STEPS, *WIDE_STEPS])
@pytest.mark.parametrize("greedy", [True, False])
def test_markov_step(n: int, width: int, rank: int, greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED and width > 100_000:
        monkeypatch.setattr(markov_step_triton, "BLOCK", 2048)
    check_step(step(n, width, rank), greedy=greedy)


# What is handed back is rounded once here, and after every step in the reference; bfloat16 holds 8 bits, float16 11.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize(("n", "width", "rank"), HALF_STEPS)
@pytest.mark.parametrize("greedy", [True, False])
def test_markov_step_in_half_precision(
    n: int, width: int, rank: int, dtype: torch.dtype, atol: float, greedy: bool
) -> None:
    check_step(step(n, width, rank, dtype), greedy=greedy, atol=atol)


def test_markov_step_takes_the_lowest_of_equal_tokens() -> None:
    case = step(4, 700, 4)
    case.w2.zero_()
    case.base.zero_()
    case.base[:, [65, 130, 699]] = 9.0  # in three blocks
    there = on_device(case)
    assert markov_step(there.base, there.latent, there.w2, path=PATH)[0].tolist() == [65] * 4


def test_markov_step_with_extreme_logits() -> None:
    case = step(4, 500, 4)
    case.base[:, :450] = -INF  # forbidden tokens, whole blocks of them
    case.base[:, 470] = 3e4
    case.base[2] = -1e30
    case.base[2, 499] = -1e29
    check_step(case, atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 1.0 - 2**-24])
def test_markov_step_at_the_ends_of_the_uniform_range(value: float) -> None:
    case = step(4, 300, 4)
    case.base[:, 290:] = -INF
    case.base[:, :3] = -INF
    case.temperature.fill_(1.0)
    case.uniform.fill_(value)
    check_step(case)


def check_verify(case: Judged) -> None:
    there = on_device(case)
    accepted, token = (part.cpu() for part in verify_draft(*there.args(), path=PATH))
    wanted, expected = (part.cpu() for part in verify_reference(*there.args()))
    assert_judged(case, accepted, token, wanted)
    assert_judged(case, wanted, expected, wanted)


@pytest.mark.parametrize(("n", "k", "width"), VERIFIED)
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_draft(n: int, k: int, width: int, sampled: bool, dtype: torch.dtype) -> None:
    for seed in range(1 if INTERPRETED and width > 2000 else 3):
        check_verify(judged(n, k, width, sampled=sampled, dtype=dtype, seed=seed))


@pytest.mark.parametrize("width", [151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_draft_at_real_widths(width: int, dtype: torch.dtype) -> None:
    n, k = (1, 2) if INTERPRETED else (2, 7)
    case = judged(n, k, width, sampled=True, near=0.95, dtype=dtype)
    case.uniform[:, 0] = 0.0  # the first draft is kept where it has any mass
    check_verify(case)


def test_verify_draft_with_ties_and_extremes() -> None:
    case = judged(3, 3, 600, sampled=False)
    case.temperature.zero_()
    case.logits.zero_()
    case.logits[:, :, [5, 599]] = 4.0
    case.tokens.fill_(5)
    case.tokens[1, 1] = 599  # as good, but not the lowest
    case.logits[2, 1] = -INF
    case.logits[2, 1, 17] = -1e30
    accepted, token = verify_draft(*on_device(case).args(), path=PATH)
    assert accepted.tolist() == [3, 1, 1]
    assert token.tolist() == [5, 5, 17]
    check_verify(case)


@pytest.mark.parametrize("sampled", [True, False])
def test_verify_draft_where_nothing_is_left(sampled: bool) -> None:
    """Draft and target have all mass on one token, and a number that cannot be drawn refuses it: the target decides."""
    case = judged(2, 1, 40, sampled=True)
    case.temperature.fill_(1.0)
    case.logits[:, 0] = -INF
    case.logits[:, 0, 11] = 0.0
    case.tokens.fill_(11)
    case.draft_probs = torch.zeros(2, 1, 40).index_fill(2, torch.tensor([11]), 1.0) if sampled else None
    case.uniform[:, 0] = 1.0
    accepted, token = verify_draft(*on_device(case).args(), path=PATH)
    assert (accepted.tolist(), token.tolist()) == ([0, 0], [11, 11])
    check_verify(case)


def test_law_of_accepted_tokens() -> None:
    assert_law(DEVICE, PATH)
