"""What is trained is what drafts: teacher-forced passes give the logits of the drafting passes, for every drafter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark_cli.backends.base import DraftRequest
from dspark_cli.backends.torch.checkpoint import build
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.drafter import make_drafter

D, V, S, BLOCK = 32, 90, 24, 4


def config(kind: str) -> DrafterConfig:
    dspark = kind == "dspark"
    return DrafterConfig(
        kind=kind, family="qwen3", hidden_size=D, target_hidden_size=D, intermediate_size=48,
        num_layers=1 if kind == "eagle3" else 2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=V,
        draft_vocab_size=60, block_size=BLOCK, target_layer_ids=(0, 2), mask_token_id=3, markov_rank=8 * dspark,
        confidence_head=dspark, confidence_head_with_markov=dspark,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_teacher_forced_on_its_own_draft_a_drafter_chooses_it_again(kind: str) -> None:
    torch.manual_seed(5)
    model = build(config(kind)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        assert model.d2t is not None
        model.d2t.copy_(torch.randperm(V)[:60].sort().values)
    features = torch.randn(1, S, 2 * D)
    ids = torch.randint(V, (1, S))
    anchors = [1, 7, 15]
    for anchor in anchors:
        with make_drafter(model, name=kind) as drafter:
            drafter.observe(0, ids[0, :anchor].tolist(), features[0, :anchor].numpy())
            draft = drafter.propose([DraftRequest(0, int(ids[0, anchor]), BLOCK)])[0]
        forced = ids.clone()
        forced[0, anchor + 1 : anchor + 1 + BLOCK] = torch.from_numpy(draft.tokens)
        with torch.no_grad():
            out = model.training_forward(features, forced, torch.tensor([[anchor]]))
        assert model.target_ids(out.logits[0, 0].argmax(-1)).tolist() == draft.tokens.tolist()
        if draft.confidence is not None:
            assert out.confidence is not None
            np.testing.assert_allclose(torch.sigmoid(out.confidence[0, 0]).numpy(), draft.confidence, atol=1e-5)


def test_chains_of_one_document_do_not_see_each_other() -> None:
    model = build(config("eagle3")).eval()
    features, ids = torch.randn(1, S, 2 * D), torch.randint(V, (1, S))
    with torch.no_grad():
        together = model.training_forward(features, ids, torch.tensor([[2, 9, 10]])).logits
        alone = model.training_forward(features, ids, torch.tensor([[9]])).logits
    torch.testing.assert_close(together[:, 1], alone[:, 0])


def test_features_at_and_after_the_anchor_are_not_seen() -> None:
    for kind in ("dspark", "eagle3"):
        model = build(config(kind)).eval()
        features, ids = torch.randn(1, S, 2 * D), torch.randint(V, (1, S))
        changed = features.clone()
        changed[:, 9:] += 1.0
        with torch.no_grad():
            first, second = (model.training_forward(f, ids, torch.tensor([[9]])).logits for f in (features, changed))
        torch.testing.assert_close(first, second)
