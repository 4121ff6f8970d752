"""Examples of one document and of many, stored and read along the way: the same numbers, the same loss, the same gradients."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dspark_cli.backends.base import DsparkError
from dspark_cli.backends.torch.checkpoint import build
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.gguf_model import load_gguf_model
from dspark_cli.training import start
from dspark_cli.training.corpus import Corpus, Example, TargetHead
from dspark_cli.training.documents import Document
from dspark_cli.training.features import FeatureCache, TorchReader
from dspark_cli.training.trainer import Trainer, TrainOptions, judge

LAYERS = (0, 2)
WIDTH, VOCABULARY, BLOCK = 64, 400, 3


def documents() -> list[Document]:
    random = np.random.default_rng(3)
    return [Document(tuple(random.integers(20, 40_000, n).tolist()), n // 3, 0.0) for n in (40, 17, 29, 23, 8, 33)]


@pytest.fixture(scope="module")
def corpora(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """The same documents out of a cache and read along the way."""
    model, texts = load_gguf_model(tiny_target), documents()
    cache = FeatureCache(tmp_path_factory.mktemp("cache"), target="t", layers=LAYERS, width=WIDTH)
    cache.append(TorchReader(model), texts, lambda n: None)
    stored = [Corpus.stored(cache, held_out=h) for h in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_cli.training.corpus.quick_bfloat16", lambda device: False)  # whatever this machine likes
        live = [Corpus.live(texts, model, LAYERS, held_out=h, together=4) for h in (False, True)]
    assert [len(c.stretches) for c in stored] == [len(c.stretches) for c in live]
    return max(stored, key=lambda c: len(c.stretches)), max(live, key=lambda c: len(c.stretches))


def drafter(kind: str, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr("dspark_cli.training.trainer.quick_bfloat16", lambda device: False)
    torch.manual_seed(1)
    dspark = kind == "dspark"
    config = DrafterConfig(
        kind=kind, family="qwen3", hidden_size=WIDTH, target_hidden_size=WIDTH, intermediate_size=48,
        num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16, vocab_size=49152, draft_vocab_size=VOCABULARY,
        block_size=BLOCK, target_layer_ids=LAYERS, mask_token_id=3, markov_rank=8 * dspark, confidence_head=dspark,
        confidence_head_with_markov=dspark,
    )  # fmt: skip
    return Trainer(build(config), TargetHead(torch.randn(VOCABULARY, WIDTH)), TrainOptions())


def test_a_document_is_the_same_alone_in_company_and_read_along_the_way(corpora: tuple[Corpus, Corpus]) -> None:
    stored, live = corpora
    together = live.example(live.stretches, 99, np.random.default_rng(0))
    for i, stretch in enumerate(stored.stretches):
        alone = stored.example([stretch], 99, np.random.default_rng(0))
        own = alone.anchors.shape[1]
        assert alone.kept.all()
        assert together.anchors[i, :own].tolist() == alone.anchors[0].tolist()
        assert together.kept[i].tolist() == [True] * own + [False] * (together.kept.shape[1] - own)
        assert together.ids[i, : stretch.length].tolist() == alone.ids[0].tolist()
        for name in ("features", "hidden", "norms"):
            mine, theirs = getattr(together, name)[i, : stretch.length], getattr(alone, name)[0]
            torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-3)  # a cache holds float16


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_a_pass_of_many_documents_teaches_what_passes_of_one_teach(
    corpora: tuple[Corpus, Corpus], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, live = corpora
    trainer = drafter(kind, monkeypatch)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def gradients(examples: list[Example]) -> tuple[float, list[torch.Tensor]]:
        loss = torch.zeros(())
        for example in examples:
            output = trainer.model.training_forward(example.features, example.ids, example.anchors)
            loss = loss + judge(output, example, trainer.head, 0.5).total * len(example.ids) / len(live.stretches)
        made = torch.autograd.grad(loss, parameters, allow_unused=True)
        return float(loss), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, made, strict=True)]

    random = np.random.default_rng(0)
    loss, many = gradients([live.example(live.stretches, 99, random)])
    expected, ones = gradients([live.example([s], 99, random) for s in live.stretches])
    assert loss == pytest.approx(expected, rel=1e-4)
    for mine, theirs in zip(many, ones, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_every_document_comes_once_a_round_and_batches_are_of_like_length(tiny_target: Path) -> None:
    random = np.random.default_rng(5)
    texts = [Document(tuple(random.integers(20, 400, n).tolist()), 4, 0.0) for n in random.integers(9, 300, 260)]
    corpus = Corpus.live(texts, load_gguf_model(tiny_target), LAYERS, held_out=False, together=8)
    count = len(corpus.stretches) // 8
    batches = list(islice(corpus.draws(np.random.default_rng(1), 8), count))
    assert all(len(b) == 8 for b in batches)
    drawn = [s.start for b in batches[: 16 * (count // 16)] for s in b]
    assert len(set(drawn)) == len(drawn)
    spread = [max(s.length for s in b) - min(s.length for s in b) for b in batches[: 16 * (count // 16)]]
    assert float(np.mean(spread)) < 60, "drawn at random, eight of these lengths are some 230 apart"


def test_capped_logits_make_the_targets_probabilities() -> None:
    """Gemma's final softcapping: the norms are of capped logits, so the rows must be capped too."""
    torch.manual_seed(0)
    rows, hidden = torch.randn(50, 8), 4 * torch.randn(3, 8)
    logits = 5 * (hidden @ rows.T / 5).tanh()
    probs, outside = TargetHead(rows[:20], 5.0).probabilities(hidden, logits.logsumexp(-1))
    torch.testing.assert_close(probs, logits.softmax(-1)[:, :20])
    torch.testing.assert_close(outside, logits.softmax(-1)[:, 20:].sum(-1))


def test_pairs_are_counted_of_the_frequent_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a large vocabulary squared would not fit into memory."""
    monkeypatch.setattr(start, "PAIRS_OF", 20)
    random = np.random.default_rng(0)
    answers = [30 + 3 * random.permutation(10) for _ in range(40)]  # ten tokens, all others never
    corpus = SimpleNamespace(answers=lambda: iter(answers))
    model = drafter("dspark", monkeypatch).model
    model.d2t.copy_(torch.arange(VOCABULARY))
    with torch.no_grad():
        start._begin_pairs(model, corpus)  # type: ignore[arg-type]
    w1, w2 = (head.weight.abs().sum(-1) > 0 for head in (model.markov_head.markov_w1, model.markov_head.markov_w2))
    for begun in (w1, w2):
        assert set(range(30, 60, 3)) <= set(begun.nonzero()[:, 0].tolist())
        assert int(begun.sum()) <= 20


@pytest.mark.parametrize("damage", ["empty", "cut", "pickle", "another"])
def test_a_damaged_checkpoint_is_said_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path, trainer = tmp_path / "checkpoint.pt", drafter("dspark", monkeypatch)
    trainer.save(path)
    trainer.resume(path)
    data = {"empty": b"", "cut": path.read_bytes()[:-500], "pickle": pickle.dumps(Trap()), "another": b""}[damage]
    path.write_bytes(data)
    if damage == "another":
        torch.save({"weights": 1}, path)
    with pytest.raises(DsparkError, match=r"checkpoint.pt cannot be used"):
        trainer.resume(path)
    assert not (tmp_path / "sprung").exists()
