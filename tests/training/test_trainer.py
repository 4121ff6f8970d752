"""A trainer refuses a step that is no number; the confidence head is fitted on documents the drafter never saw, and left alone
where that does not help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_cli.backends.base import DsparkError
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.training.confidence import fit_confidence
from dspark_cli.training.corpus import Corpus
from dspark_cli.training.pipeline import Pipeline, Recipe
from dspark_cli.training.trainer import Trainer


class Silent:
    def begin(self, stage: str, total: float, have: float, note: str) -> None: ...
    def advance(self, amount: float, note: str = "") -> None: ...
    def end(self) -> None: ...


@pytest.fixture(scope="module")
def untrained(tiny_target: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Corpus]:
    """A drafter as training begins with it, and all documents but the held-out ones."""
    work = tmp_path_factory.mktemp("confidence")
    for name in ("documents.jsonl", "features"):
        (work / name).symlink_to(trained / name)
    recipe = Recipe("tiny", block=3, rank=8, vocabulary=512, tokens=12_000, through="torch")
    pipeline = Pipeline(tiny_target, work, recipe, Silent())
    corpus = Corpus.stored(pipeline._cache(), held_out=False)
    trainer, _ = pipeline._trainer(corpus, None)
    return trainer, corpus


def test_it_knows_more_after_the_fit_and_is_not_too_sure(untrained: tuple[Trainer, Corpus]) -> None:
    trainer, corpus = untrained
    assert isinstance(trainer.model, DSpark)
    head = trainer.model.confidence_head
    assert head is not None
    with torch.no_grad():
        head.proj.bias.fill_(4.0)  # too sure by far
    fit = fit_confidence(trainer, corpus, corpus.stretches)
    assert fit is not None
    assert fit.bce_after < 0.5 * fit.bce_before
    assert fit.rows > 1000
    again = fit_confidence(trainer, corpus, corpus.stretches)
    assert again is not None
    assert again.bce_before == pytest.approx(fit.bce_after, abs=1e-3), "what was reported is what the head now does"


def test_a_head_that_does_better_already_is_kept(
    untrained: tuple[Trainer, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, corpus = untrained
    fit_confidence(trainer, corpus, corpus.stretches)
    assert isinstance(trainer.model, DSpark)
    head = trainer.model.confidence_head
    assert head is not None
    before = head.proj.weight.clone(), head.proj.bias.clone()
    monkeypatch.setattr(  # a fit that went wrong
        "dspark_cli.training.confidence._logistic",
        lambda inputs, wanted, decay: (torch.ones(inputs.shape[1]), torch.full((1,), 5.0)),
    )
    fit = fit_confidence(trainer, corpus, corpus.stretches)
    assert fit is not None
    assert fit.bce_after == fit.bce_before
    assert torch.equal(head.proj.weight, before[0])
    assert torch.equal(head.proj.bias, before[1])


def test_too_few_documents_change_nothing(untrained: tuple[Trainer, Corpus]) -> None:
    trainer, corpus = untrained
    assert fit_confidence(trainer, corpus, corpus.stretches[:7]) is None


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(untrained: tuple[Trainer, Corpus]) -> None:
    trainer, corpus = untrained
    before = {name: value.clone() for name, value in trainer.weights().items()}
    [example] = corpus.examples(corpus.stretches[:1], 16, np.random.default_rng(0))
    example.features.fill_(float("nan"))
    with pytest.raises(DsparkError, match="training diverged in step 1: loss nan"):
        trainer.step([example])
    assert all(torch.equal(value, before[name]) for name, value in trainer.weights().items())
