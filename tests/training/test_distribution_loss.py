"""The chunked loss against autograd: value, gradient, and rows that count for nothing."""

from __future__ import annotations

import pytest
import torch

from dspark_cli.kernels import distribution_loss as op


def case(rows: int, width: int, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    probs = (torch.randn(9, width) * scale).softmax(-1) * 0.97
    shares = torch.rand(rows, 2) / rows
    shares[::3] = 0.0
    return torch.randn(rows, width) * scale, probs, torch.randint(9, (rows,)), 1 - probs.sum(-1), shares


@pytest.mark.parametrize(("rows", "width", "scale"), [(1, 5, 3.0), (70, 4099, 3.0), (300, 8192, 30.0)])
def test_value_and_gradient_are_autograds(rows: int, width: int, scale: float) -> None:
    logits, *rest = case(rows, width, scale)
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss, l1 = op.distribution_loss(mine, *rest)
    expected, expected_l1 = op.reference(theirs, *rest)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(l1, expected_l1, rtol=1e-5, atol=1e-6)
    assert mine.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-8)
    assert not mine.grad[::3].any()


def test_bfloat16_logits_keep_their_dtype() -> None:
    logits, *rest = case(40, 512)
    short = logits.bfloat16().requires_grad_()
    loss, _ = op.distribution_loss(short, *rest)
    loss.backward()
    assert short.grad is not None
    assert short.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, op.reference(short.detach(), *rest)[0], rtol=1e-5, atol=1e-6)


def test_the_chunked_path_is_what_a_cpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    forward = op._Chunked.apply
    monkeypatch.setattr(op._Chunked, "apply", lambda *a: (taken.append(1), forward(*a))[1])
    op.distribution_loss(*case(4, 16))
    assert taken
