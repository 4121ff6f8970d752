"""Losses on a reduced draft vocabulary and at their edges; the recorded numbers are in test_golden_loss.py."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from dspark_cli.backends.torch.loss import (  # noqa: E402
    LossSettings,
    drafter_losses,
    drafter_metrics,
    on_draft_vocabulary,
    position_weights,
)

SHAPE = (2, 3, 4)  # documents, anchors, drafts
V, D2T = 12, torch.tensor([1, 4, 5, 9])


def example() -> tuple[torch.Tensor, ...]:
    """(logits over D2T, confidence, target probabilities over V, target ids, valid)."""
    torch.manual_seed(0)
    logits, confidence = torch.randn(*SHAPE, len(D2T)), torch.randn(SHAPE)
    return logits, confidence, torch.randn(*SHAPE, V).softmax(-1), torch.randint(V, SHAPE), torch.rand(SHAPE) > 0.2


def test_a_reduced_drafter_is_a_whole_one_that_gives_the_other_tokens_nothing() -> None:
    logits, confidence, probs, ids, valid = example()
    whole_logits = torch.full((*SHAPE, V), -1e4)
    whole_logits[..., D2T] = logits
    known = torch.isin(ids, D2T)
    whole = drafter_losses(whole_logits, confidence, probs, torch.where(known, ids, -1), valid, LossSettings())
    ours, outside, draft_ids = on_draft_vocabulary(probs, ids, D2T)
    reduced = drafter_losses(logits, confidence, ours, draft_ids, valid, LossSettings(), outside=outside)
    torch.testing.assert_close(reduced.total, whole.total)
    torch.testing.assert_close(reduced.accept_rate, whole.accept_rate)


def test_labels_outside_the_draft_vocabulary() -> None:
    _, outside, ids = on_draft_vocabulary(torch.full((1, V), 1 / V), torch.tensor([4]), D2T)
    assert ids.tolist() == [1]
    torch.testing.assert_close(outside, torch.tensor([1 - len(D2T) / V]))
    assert on_draft_vocabulary(torch.full((1, V), 1 / V), torch.tensor([3]), D2T)[2].tolist() == [-1]


def test_nothing_to_learn_from_is_zero_and_not_nan() -> None:
    logits, confidence, probs, ids, valid = example()
    logits.requires_grad_(True)
    parts = on_draft_vocabulary(probs, ids, D2T)
    none = torch.zeros_like(valid)
    losses = drafter_losses(logits, confidence, parts[0], parts[2], none, LossSettings(), outside=parts[1])
    losses.total.backward()
    assert losses.total.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_perfect_drafter() -> None:
    """TV 0, accept rate 1, and without decay or confidence tau is the block length plus one."""
    logits = torch.randn(1, 2, 3, V)
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    losses = drafter_losses(logits, None, logits.softmax(-1), logits.argmax(-1), valid, LossSettings(decay=None))
    assert losses.confidence is None
    torch.testing.assert_close(losses.l1.value, torch.tensor(0.0), atol=1e-6, rtol=0)
    metrics = drafter_metrics(losses, None)
    torch.testing.assert_close(metrics.tau, torch.tensor(4.0), atol=1e-4, rtol=0)
    assert metrics.confidence_bias is None


def test_weights_fall_along_the_block() -> None:
    weights = position_weights(torch.tensor([[[True, True, False]]]), decay=2.0)
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 0.60653066, 0.0]]]))
