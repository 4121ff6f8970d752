"""Torch drafters through their contract: batches, caches, sampling, reduced vocabularies; training against drafting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from dspark_cli.backends.base import Draft, DraftRequest, DsparkError  # noqa: E402
from dspark_cli.backends.torch import speed  # noqa: E402
from dspark_cli.backends.torch.anchors import sample_anchors  # noqa: E402
from dspark_cli.backends.torch.config import DrafterConfig  # noqa: E402
from dspark_cli.backends.torch.drafter import TorchDrafter, make_drafter  # noqa: E402
from test_torch_checkpoint import EAGLE, TINY, random_model  # noqa: E402
from tests_support import whole_row  # noqa: E402

CONFIGS = {
    "dspark": TINY,
    "rnn": replace(TINY, markov_head_type="rnn"),
    "gated": replace(TINY, markov_head_type="gated", confidence_head_with_markov=False),
    "dflash": replace(TINY, kind="dflash", markov_rank=0, confidence_head=False, confidence_head_with_markov=False),
    "anchor not drafting": replace(TINY, sample_from_anchor=False),
    "reduced": replace(TINY, draft_vocab_size=10),
    "gemma4": replace(TINY, family="gemma4", shared_key_value=True, embed_scale=4.0, softcap=5.0),
    "sliding": replace(TINY, layer_types=("sliding_attention", "full_attention"), sliding_window=3),
    "causal sliding": replace(TINY, layer_types=("sliding_attention",) * 2, sliding_window=3, causal_sliding=True),
    "eagle3": EAGLE,
    "eagle3 gemma4": replace(EAGLE, family="gemma4", shared_key_value=True, embed_scale=4.0, softcap=5.0),
    "eagle3 normed residual": replace(EAGLE, norm_before_residual=True, qk_norm=False),
}
BLOCK_KINDS = [name for name, config in CONFIGS.items() if config.kind != "eagle3"]
WIDTH = 32  # two features of the target's 16


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def drafter_for(config: DrafterConfig) -> TorchDrafter:
    return make_drafter(model_for(config), name="test")


def model_for(config: DrafterConfig) -> Any:
    model = random_model(config)
    if config.reduced:
        model.d2t = torch.arange(config.draft_vocab_size) * 3 + 1
    return model


def text(length: int, seed: int = 0) -> tuple[list[int], np.ndarray]:
    """Tokens [length] and features [length, m*d] of a made-up sequence."""
    random = np.random.default_rng(seed)
    return random.integers(0, 40, length).tolist(), random.normal(size=(length, WIDTH)).astype(np.float32)


def assert_same(one: Draft, other: Draft) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    for name in ("confidence", "probs"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def sampler(seed: int, n_vocab: int = 40) -> Any:
    """A `choose` that draws by its own numbers."""
    random = np.random.default_rng(seed)

    def choose(logits: np.ndarray, drafted: Sequence[int], ids: np.ndarray | None) -> tuple[int, np.ndarray]:
        logits = whole_row(logits, ids, n_vocab)
        weights = np.exp(logits - logits.max())
        probs = (weights / weights.sum()).astype(np.float32)
        return int(random.choice(len(probs), p=probs.astype(np.float64) / probs.astype(np.float64).sum())), probs

    return choose


every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_config
@pytest.mark.parametrize("slots", [(0, 1, 2), (5, 0, 3)], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_batch_drafts_what_each_sequence_alone_drafts(
    config: DrafterConfig, slots: tuple[int, ...], sampled: bool
) -> None:
    together, alone, lengths = drafter_for(config), [], (3, 11, 7)
    for slot, length in zip(slots, lengths, strict=True):
        single = drafter_for(config)
        for drafter, seq in ((single, 0), (together, slot)):
            drafter.observe(seq, *text(length, seed=length))
        alone += single.propose([DraftRequest(0, length, 4, sampler(length) if sampled else None)])
    requests = [
        DraftRequest(slot, length, 4, sampler(length) if sampled else None)
        for slot, length in zip(slots, lengths, strict=True)
    ]
    for ours, theirs in zip(together.propose(requests), alone, strict=True):
        assert_same(ours, theirs)
        assert (ours.probs is not None) == sampled


@every_config
def test_proposing_leaves_nothing_behind(config: DrafterConfig) -> None:
    drafter = drafter_for(config)
    drafter.observe(0, *text(9))
    first, length = drafter.propose([DraftRequest(0, 5, 4)])[0], drafter.length(0)
    drafter.propose([DraftRequest(0, 6, 4, sampler(1))])
    assert drafter.length(0) == length
    assert_same(drafter.propose([DraftRequest(0, 5, 4)])[0], first)


@every_config
def test_observing_in_pieces_is_observing_at_once(config: DrafterConfig) -> None:
    tokens, features = text(600)  # past the store's first capacity
    whole, pieces = drafter_for(config), drafter_for(config)
    whole.observe(0, tokens, features)
    for start, stop in ((0, 1), (1, 2), (2, 300), (300, 300), (300, 600)):
        pieces.observe(0, tokens[start:stop], features[start:stop])
        pieces.propose([DraftRequest(0, tokens[stop % 600], 4)])
    assert_same(*(drafter.propose([DraftRequest(0, 5, 4)])[0] for drafter in (whole, pieces)))


@every_config
def test_rewinding_is_never_having_seen_it(config: DrafterConfig) -> None:
    tokens, features = text(12)
    drafter, fresh = drafter_for(config), drafter_for(config)
    drafter.observe(0, *text(12, seed=1))
    drafter.rewind(0, 4)
    fresh.observe(0, *(part[:4] for part in text(12, seed=1)))
    for each in (drafter, fresh):
        each.observe(0, tokens[4:9], features[4:9])
    assert drafter.length(0) == 9
    assert_same(*(each.propose([DraftRequest(0, 5, 4)])[0] for each in (drafter, fresh)))


@every_config
def test_a_fork_goes_its_own_way(config: DrafterConfig) -> None:
    tokens, features = text(12)
    drafter, fresh = drafter_for(config), drafter_for(config)
    drafter.observe(1, tokens, features)
    drafter.fork(1, 4, 6)
    before = drafter.propose([DraftRequest(1, 5, 4)])[0]
    drafter.observe(4, *text(3, seed=2))
    fresh.observe(0, tokens[:6], features[:6])
    fresh.observe(0, *text(3, seed=2))
    assert_same(drafter.propose([DraftRequest(4, 5, 4)])[0], fresh.propose([DraftRequest(0, 5, 4)])[0])
    assert_same(drafter.propose([DraftRequest(1, 5, 4)])[0], before)


@every_config
def test_a_short_draft_is_the_beginning_of_the_long_one(config: DrafterConfig) -> None:
    drafter = drafter_for(config)
    drafter.observe(0, *text(9))
    whole = drafter.propose([DraftRequest(0, 5, 99)])[0]
    assert len(whole) == config.block_size
    assert_same(drafter.propose([DraftRequest(0, 5, 2)])[0], whole.prefix(2))


@every_config
def test_blocks_of_different_length_in_one_pass(config: DrafterConfig) -> None:
    drafter = drafter_for(config)
    for seq in range(3):
        drafter.observe(seq, *text(5 + seq, seed=seq))
    drafts = drafter.propose([DraftRequest(0, 1, 3), DraftRequest(1, 2, 0), DraftRequest(2, 3, 1, sampler(0))])
    assert [len(draft) for draft in drafts] == [3, 0, 1]
    assert drafts[2].probs is not None
    assert drafts[2].probs.shape == (1, 40)


@every_config
def test_drop_and_close(config: DrafterConfig) -> None:
    drafter = drafter_for(config)
    drafter.observe(0, *text(9))
    drafter.drop(0)
    assert drafter.length(0) == 0
    drafter.observe(0, *text(9))
    drafter.close()
    drafter.close()
    assert drafter.store.size_bytes == 0


def test_eagle3_needs_a_feature_to_start_from() -> None:
    drafter = drafter_for(EAGLE)
    drafter.observe(1, *text(4))
    nothing, something = drafter.propose([DraftRequest(0, 5, 4), DraftRequest(1, 5, 4)])
    assert (len(nothing), len(something)) == (0, 4)


@every_config
def test_wrong_features_are_refused_with_their_shape(config: DrafterConfig) -> None:
    drafter = drafter_for(config)
    with pytest.raises(DsparkError, match=r"shape \(2, 8\), needs \(2, 32\)"):
        drafter.observe(0, [1, 2], np.zeros((2, 8), dtype=np.float32))
    with pytest.raises(DsparkError, match="shape None"):
        drafter.observe(0, [1, 2], None)


@every_config
def test_every_feature_is_projected_once(config: DrafterConfig) -> None:
    drafter, rows = drafter_for(config), []
    drafter.model.fc.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    for start in range(0, 12, 3):
        tokens, features = text(12)
        drafter.observe(0, tokens[start : start + 3], features[start : start + 3])
        drafter.propose([DraftRequest(0, 5, 4)])
    assert sum(rows) == 12


@pytest.mark.parametrize("name", BLOCK_KINDS)
def test_one_pass_serves_all_sequences(name: str) -> None:
    drafter, shapes = drafter_for(CONFIGS[name]), []
    drafter.model.norm.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    for seq in range(3):
        drafter.observe(seq, *text(5 + seq))
    drafter.propose([DraftRequest(seq, 5, 4) for seq in range(3)])
    assert shapes == [(3, drafter.config.block_rows, 16)]


@pytest.mark.parametrize("name", ["reduced", "eagle3"])
def test_reduced_vocabulary(name: str) -> None:
    """Tokens and distributions are the target's: the map is applied last, and unknown tokens have probability 0."""
    drafter = drafter_for(CONFIGS[name])
    known = drafter.model.d2t.tolist()
    drafter.observe(0, *text(9))
    greedy, sampled = (drafter.propose([DraftRequest(0, 5, 4, choose)])[0] for choose in (None, sampler(3)))
    assert set(greedy.tokens.tolist()) <= set(known)
    assert set(sampled.tokens.tolist()) <= set(known)
    assert set(np.flatnonzero(sampled.probs.sum(axis=0)).tolist()) <= set(known)
    np.testing.assert_allclose(sampled.probs.sum(axis=1), 1.0, atol=1e-5)


def test_a_reduced_drafter_is_the_whole_one_without_the_other_tokens() -> None:
    """Same weights: the best token among the known ones, given the same tokens before."""
    whole, reduced = model_for(TINY), model_for(CONFIGS["reduced"])
    ids = reduced.d2t
    state = dict(whole.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"][ids]
    state["markov_head.markov_w2.weight"] = state["markov_head.markov_w2.weight"][ids]
    reduced.load_state_dict(state | {"d2t": ids})
    drafters = [make_drafter(model, name="test") for model in (whole, reduced)]
    mask = np.full(40, -np.inf, dtype=np.float32)
    mask[ids.numpy()] = 0

    def best_known(logits: np.ndarray, drafted: Sequence[int], ids: np.ndarray | None) -> tuple[int, np.ndarray]:
        return int((logits + mask).argmax()), logits

    for drafter in drafters:
        drafter.observe(0, *text(9))
    theirs = drafters[0].propose([DraftRequest(0, 5, 4, best_known)])[0]
    ours = drafters[1].propose([DraftRequest(0, 5, 4)])[0]
    assert ours.tokens.tolist() == theirs.tokens.tolist()


@pytest.mark.parametrize("n_vocab", [30, 44])
def test_padded_vocabularies(n_vocab: int) -> None:
    drafter = make_drafter(model_for(TINY), name="test", n_vocab=n_vocab)
    drafter.observe(0, *text(9))
    greedy, sampled = (drafter.propose([DraftRequest(0, 5, 4, choose)])[0] for choose in (None, sampler(3, n_vocab)))
    assert sampled.probs.shape == (4, n_vocab)
    assert max(*greedy.tokens, *sampled.tokens) < min(n_vocab, 40)


def test_the_anchor_row_can_be_context_only() -> None:
    """Without `sample_from_anchor` a block has one row more, and the first draft comes from the first mask row."""
    drafter, seen = drafter_for(CONFIGS["anchor not drafting"]), {}
    drafter.model.norm.register_forward_hook(lambda module, inputs, output: seen.update(hidden=output))
    drafter.observe(0, *text(9))
    draft = drafter.propose([DraftRequest(0, 5, 4)])[0]
    model, hidden = drafter.model, seen["hidden"]
    assert hidden.shape[1] == 5
    with torch.inference_mode():
        bias = model.markov_head.block_bias(model.markov_head.embed(torch.tensor([[5]])), hidden[:, 1:2])
        assert int((model.base_logits(hidden[:, 1:2]) + bias).argmax()) == draft.tokens[0]


@pytest.mark.parametrize("name", BLOCK_KINDS)
def test_training_sees_what_drafting_sees(name: str) -> None:
    """Teacher-forced logits of every anchor of a document = logits of drafting there, along the same tokens."""
    config = CONFIGS[name]
    tokens, features = text(16)
    drafter = drafter_for(config)
    drafter.observe(0, tokens, features)
    anchors = torch.tensor([[0, 3, 9, 15]])
    out = drafter.model.training_forward(torch.from_numpy(features)[None], torch.tensor([tokens]), anchors)
    for index, anchor in reversed(list(enumerate(anchors[0].tolist()))):
        drafter.rewind(0, anchor)
        known = tokens[anchor + 1 : anchor + 5]
        rows = forced_logits(drafter, tokens[anchor], [*known, *[0] * (4 - len(known))])
        count = min(len(known) + 1, 4)  # past the end of the document the tokens before are not the same
        ours = out.logits[0, index, :count].detach().numpy()
        np.testing.assert_allclose(ours, rows[:count], atol=1e-4, rtol=1e-4)


def forced_logits(drafter: TorchDrafter, anchor: int, tokens: list[int]) -> np.ndarray:
    """[k, W] over the draft vocabulary, while `tokens` are drafted."""
    rows: list[np.ndarray] = []

    def take_given(logits: np.ndarray, drafted: Sequence[int], ids: np.ndarray | None) -> tuple[int, np.ndarray]:
        rows.append(logits.copy())
        return tokens[len(drafted)], logits

    drafter.propose([DraftRequest(0, anchor, len(tokens), take_given)])
    return np.stack(rows)


def test_training_after_drafting_has_gradients() -> None:
    """Drafting runs in inference mode; nothing it caches may reach autograd."""
    drafter = drafter_for(TINY)
    drafter.observe(0, *text(9))
    drafter.propose([DraftRequest(0, 5, 4)])
    tokens, features = text(9)
    out = drafter.model.training_forward(
        torch.from_numpy(features)[None], torch.tensor([tokens]), torch.tensor([[2, 5]]), rows=2
    )
    assert out.logits.shape == (1, 2, 2, 40)
    (out.logits.square().sum() + out.confidence.sum()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in drafter.model.parameters()
    )


def test_dummy_blocks_are_finite() -> None:
    tokens, features = text(9)
    model = model_for(TINY)
    keep = torch.tensor([[True, False]])
    out = model.training_forward(torch.from_numpy(features)[None], torch.tensor([tokens]), torch.tensor([[4, 0]]), keep)
    assert out.logits.isfinite().all()


def test_sampled_anchors() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1.0], [0, 0, 1, 1, 0, 0, 0]])
    positions, keep = sample_anchors(mask, 4, torch.Generator().manual_seed(0))
    assert positions.tolist() == [[1, 2, 5, 0], [2, 0, 0, 0]]
    assert keep.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert sample_anchors(mask, 20)[0].shape == (2, 20)


@every_config
def test_bfloat16(config: DrafterConfig) -> None:
    drafter = make_drafter(model_for(config).to(torch.bfloat16), name="test")
    drafter.observe(0, *text(9))
    assert len(drafter.propose([DraftRequest(0, 5, 4)])[0]) == 4


def test_the_fastest_format_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed.fastest_dtype(TINY) in (torch.float32, torch.bfloat16)
    times = {torch.float32: 3.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(speed, "_milliseconds", lambda rows, shape, dtype, device: times[dtype])
    assert speed.fastest_dtype(TINY) == torch.bfloat16
    times[torch.bfloat16] = 9.0
    assert speed.fastest_dtype(TINY) == torch.float32
