"""The recorded training losses: labels, masks, teacher-forced logits, loss terms, metrics, gradients, their norms."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from test_golden_cases import Case, all_cases, assert_matches, read_tensors

torch = pytest.importorskip("torch")

from dspark_cli.backends.torch.anchors import block_positions, gather_rows, make_labels  # noqa: E402
from dspark_cli.backends.torch.checkpoint import load_drafter  # noqa: E402
from dspark_cli.backends.torch.loss import LossSettings, drafter_losses, drafter_metrics  # noqa: E402

INPUTS = (
    "input_ids",
    "loss_mask",
    "target_hidden_states",
    "target_last_hidden_states",
    "anchor_positions",
    "block_keep_mask",
)
#: relative; the README's figure. `metric.*` are ratios of the same sums
LOSS_RTOL = 1e-5
GRADIENT_RTOL = 1e-4


def loss_cases() -> list[Case]:
    return [case for case in all_cases() if (case.folder / "loss.safetensors").is_file()]


def loss_tensors() -> list[Any]:
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in loss_cases()
        for name in read_tensors(case.folder / "loss.safetensors")
        if name not in INPUTS
    ]


@lru_cache
def measured_loss(case_name: str) -> dict[str, Any]:
    """Everything but the inputs, from one forward and one backward pass."""
    torch.set_num_threads(1)
    case = next(case for case in all_cases() if case.name == case_name)
    given = {name: torch.from_numpy(value) for name, value in read_tensors(case.folder / "loss.safetensors").items()}
    recorded = case.settings.get("loss", {}).get("settings", {})
    settings = LossSettings(
        ce=recorded.get("ce_loss_alpha", 0.1),
        l1=recorded.get("l1_loss_alpha", 0.9),
        confidence=recorded.get("confidence_head_alpha", 1.0),
        decay=recorded.get("loss_decay_gamma", 4.0),
    )
    model: Any = load_drafter(case.draft).requires_grad_(True)
    keep, anchors = given["block_keep_mask"].bool(), given["anchor_positions"]
    labels = make_labels(given["input_ids"], given["loss_mask"], anchors, keep, model.config.block_size)
    out = model.training_forward(given["target_hidden_states"], given["input_ids"], anchors, keep)
    with torch.no_grad():
        aligned = model.base_logits(gather_rows(given["target_last_hidden_states"], (labels.indices - 1).clamp(min=0)))
    losses = drafter_losses(out.logits, out.confidence, aligned.softmax(-1), labels.ids, labels.valid, settings)
    losses.total.backward()
    metrics = drafter_metrics(losses, out.confidence)
    found: dict[str, Any] = {
        "draft_position_ids": block_positions(anchors, model.config.block_rows).flatten(1),
        "target_ids": labels.ids,
        "eval_mask": labels.valid,
        "loss_weight_mask": losses.weights,
        "draft_logits": out.logits * labels.valid.unsqueeze(-1),
        "aligned_target_logits": aligned * labels.valid.unsqueeze(-1),
        "confidence_pred": None if out.confidence is None else out.confidence * labels.valid,
        "accept_rate": losses.accept_rate,
        "total_loss": losses.total,
        "metric.accept_rate_by_position": metrics.accept_rate_by_position,
        "metric.confidence_abs_error": metrics.confidence_abs_error,
        "metric.confidence_bias": metrics.confidence_bias,
        "metric.confidence_cumprod_bias": metrics.confidence_cumprod_bias,
        "metric.tau_probabilistic": metrics.tau,
    }
    for name, term in (("ce_loss", losses.ce), ("l1_loss", losses.l1), ("confidence_loss", losses.confidence)):
        if term is not None:
            found |= {name: term.value, f"term.{name}_num": term.numerator, f"term.{name}_den": term.denominator}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found |= {f"grad.{name}": parameter.grad, f"grad_norm.{name}": parameter.grad.norm()}
    return {name: value.detach().numpy() for name, value in found.items() if value is not None}


@pytest.mark.parametrize(("case", "name"), loss_tensors())
def test_loss(case: Case, name: str) -> None:
    want = read_tensors(case.folder / "loss.safetensors")[name]
    got = measured_loss(case.name)[name].reshape(want.shape)
    if name.startswith("grad."):
        assert np.linalg.norm(got - want) <= GRADIENT_RTOL * np.linalg.norm(want)
    elif name.startswith("grad_norm."):
        np.testing.assert_allclose(got, want, rtol=GRADIENT_RTOL)
    elif name.endswith("_loss") or name.startswith("term."):
        np.testing.assert_allclose(got, want, rtol=LOSS_RTOL)
    else:
        assert_matches(name, got, want)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in loss_cases()])
def test_frozen_matrices_have_no_recorded_gradient(case: Case) -> None:
    """Whatever has a recorded norm is a parameter of ours, and only embedding and output head have none."""
    path = case.folder / "loss.safetensors"
    recorded = {name.removeprefix("grad_norm.") for name in read_tensors(path) if name.startswith("grad_norm.")}
    ours = {name for name, _ in load_drafter(case.draft).named_parameters()}
    assert ours - recorded == {"embed_tokens.weight", "lm_head.weight"}
