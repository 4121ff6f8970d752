"""The Triton kernels against their references, under Triton's interpreter (run by tests/test_kernels.py).

Counts and greedy tokens must be equal. Logits may differ by rounding (another order of r products); a drawn token must be the
one that its uniform number means, up to the rounding of a sum over the vocabulary.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from dspark_cli.kernels.markov_step import markov_step  # noqa: E402
from dspark_cli.kernels.markov_step import reference as step_reference  # noqa: E402
from dspark_cli.kernels.verify_draft import reference as verify_reference  # noqa: E402
from dspark_cli.kernels.verify_draft import verify_draft  # noqa: E402
from kernel_cases import Judged, Step, assert_drawn, assert_judged, judged, step  # noqa: E402

INF = float("inf")


def test_the_kernels_run_in_the_interpreter_here() -> None:
    from dspark_cli.kernels import markov_step_triton

    assert os.environ["TRITON_INTERPRET"] == "1"
    assert type(markov_step_triton.correct).__name__ == "InterpretedFunction"


def check_step(case: Step, *, greedy: bool = False, atol: float = 1e-4) -> None:
    heat, uniform = (None, None) if greedy else (case.temperature, case.uniform)
    tokens, logits = markov_step(case.base, case.latent, case.w2, heat, uniform, path="triton")
    wanted, corrected = step_reference(case.base, case.latent, case.w2, heat, uniform)
    assert logits.dtype == corrected.dtype
    torch.testing.assert_close(logits, corrected, atol=atol, rtol=atol)
    # the kernel chooses by float32 sums, whatever the inputs' dtype
    exact = case.base.double() + case.latent.double() @ case.w2.double().T
    for i, token in enumerate(tokens.tolist()):
        if heat is None or float(heat[i]) == 0:
            assert token == int(exact[i].argmax())
            if case.base.dtype == torch.float32:
                assert token == int(wanted[i])
        else:
            scaled = exact[i] / float(heat[i])
            assert_drawn((scaled - scaled.max()).exp(), token, float(case.uniform[i]))


@pytest.mark.parametrize(("n", "width", "rank"), [(1, 1, 1), (3, 63, 4), (4, 65, 16), (5, 1000, 33), (2, 4097, 256)])
@pytest.mark.parametrize("greedy", [True, False])
def test_markov_step_at_odd_sizes(n: int, width: int, rank: int, greedy: bool) -> None:
    check_step(step(n, width, rank), greedy=greedy)


@pytest.mark.parametrize("width", [151_936, 262_144])
def test_markov_step_at_real_widths(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark_cli.kernels import markov_step_triton

    monkeypatch.setattr(markov_step_triton, "BLOCK", 2048)  # the interpreter pays by the program
    check_step(step(2, width, 4))


def test_markov_step_in_bfloat16() -> None:
    # bfloat16 holds 8 bits: what is handed back is rounded once here, and after every step in the reference
    check_step(step(4, 3000, 64, torch.bfloat16), atol=0.06)


def test_markov_step_takes_the_lowest_of_equal_tokens() -> None:
    case = step(4, 700, 4)
    case.w2.zero_()
    case.base.zero_()
    case.base[:, [65, 130, 699]] = 9.0  # in three blocks
    tokens, _ = markov_step(case.base, case.latent, case.w2, path="triton")
    assert tokens.tolist() == [65] * 4


def test_markov_step_with_extreme_logits() -> None:
    case = step(4, 500, 4)
    case.base[:, :450] = -INF  # forbidden tokens, whole blocks of them
    case.base[:, 470] = 3e4
    case.base[2] = -1e30
    case.base[2, 499] = -1e29
    check_step(case, atol=1e-2)


def test_markov_step_at_the_ends_of_the_uniform_range() -> None:
    for value in (0.0, 1.0 - 2**-24):
        case = step(4, 300, 4)
        case.base[:, 290:] = -INF
        case.base[:, :3] = -INF
        case.temperature.fill_(1.0)
        case.uniform.fill_(value)
        check_step(case)


def check_verify(case: Judged) -> None:
    accepted, token = verify_draft(*case.args(), path="triton")
    wanted, expected = verify_reference(*case.args())
    assert_judged(case, accepted, token, wanted)
    assert_judged(case, wanted, expected, wanted)


@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 2), (5, 3, 7), (4, 5, 2049), (2, 7, 5000), (3, 0, 50)])
@pytest.mark.parametrize("sampled", [True, False])
def test_verify_draft_at_odd_sizes(n: int, k: int, width: int, sampled: bool) -> None:
    for seed in range(3 if width < 2000 else 1):
        check_verify(judged(n, k, width, sampled=sampled, seed=seed))


@pytest.mark.parametrize("width", [151_936, 262_144])
def test_verify_draft_at_real_widths(width: int) -> None:
    case = judged(1, 2, width, sampled=True, near=0.95)
    case.uniform[:, 0] = 0.0  # the first draft is kept where it has any mass
    check_verify(case)


def test_verify_draft_in_bfloat16() -> None:
    check_verify(judged(6, 4, 3000, sampled=True, dtype=torch.bfloat16))


def test_verify_draft_with_ties_and_extremes() -> None:
    case = judged(3, 3, 600, sampled=False)
    case.temperature.zero_()
    case.logits.zero_()
    case.logits[:, :, [5, 599]] = 4.0
    case.tokens.fill_(5)
    case.tokens[1, 1] = 599  # as good, but not the lowest
    case.logits[2, 1] = -INF
    case.logits[2, 1, 17] = -1e30
    accepted, token = verify_draft(*case.args(), path="triton")
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
    accepted, token = verify_draft(*case.args(), path="triton")
    assert (accepted.tolist(), token.tolist()) == ([0, 0], [11, 11])
    check_verify(case)
