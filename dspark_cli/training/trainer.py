"""Trains a DSpark or DFlash drafter on a feature cache.

Samples per second is what counts on a small machine: every answer position of a document is an anchor,
all blocks share the document's context keys, and most of the time goes to short blocks, the full block last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dspark_cli.backends.torch.anchors import gather_rows
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.dspark import DSpark, TrainingOutput
from dspark_cli.training.features import FeatureCache, Span

POSITION_DECAY = 4.0  # weight of position k is exp(-(k-1)/4) (paper, training loss)


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    hours:        the cosine schedule's length; a resumed run goes on where it was
    anchors:      anchors per document and step (documents are short: usually all positions)
    short_share:  share of the time spent on blocks of `short_rows`
    """

    hours: float = 1.0
    anchors: int = 192
    short_share: float = 0.6
    short_rows: int = 2
    lr: float = 2e-3
    muon_lr: float = 0.02
    warmup: float = 0.02
    seed: int = 0
    threads: int | None = None


@dataclass
class Progress:
    """What a run reports: seconds of training so far, positions seen, and the running means of the loss terms."""

    seconds: float = 0.0
    steps: int = 0
    positions: int = 0
    loss: float = 0.0
    accept: float = 0.0


class TargetHead:
    """The target's output rows of the draft vocabulary: gives its probabilities from cached final hidden states."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # [W, d]

    def probabilities(self, hidden: Tensor) -> Tensor:
        """[..., W] of hidden [..., d], normalised over the draft vocabulary."""
        return (hidden @ self.rows.T).softmax(dim=-1)


@dataclass(frozen=True)
class Example:
    """A document ready to train on: ids [1, S], features [1, S, m*d], target probabilities [S, W], anchors [1, A]."""

    ids: Tensor
    features: Tensor
    target_probs: Tensor
    anchors: Tensor


class Corpus:
    """Documents of a feature cache as examples. Reads what is there now, so a cache that still grows can be used."""

    def __init__(self, cache: FeatureCache, head: TargetHead, *, held_out: bool) -> None:
        self._cache, self._head, self._held_out = cache, head, held_out
        self.refresh()

    def refresh(self) -> None:
        spans = self._cache.spans
        self.spans = [s for s in spans if s.held_out == self._held_out and s.length - s.answer_start > 2]
        self._arrays = {name: self._cache.array(name) for name in ("tokens.i32", "features.f16", "hidden.f16")}

    def example(self, span: Span, anchors: int, generator: np.random.Generator) -> Example:
        """`anchors` random anchors of the answer (sorted); the answer's opening counts, its last token does not."""
        rows = slice(span.start, span.start + span.length)
        ids = torch.from_numpy(self._arrays["tokens.i32"][rows, 0].astype(np.int64))[None]
        features = torch.from_numpy(self._arrays["features.f16"][rows].astype(np.float32))[None]
        hidden = torch.from_numpy(self._arrays["hidden.f16"][rows].astype(np.float32))
        able = np.arange(max(1, span.answer_start - 1), span.length - 1)
        chosen = able if len(able) <= anchors else np.sort(generator.choice(able, anchors, replace=False))
        with torch.no_grad():
            probs = self._head.probabilities(hidden)
        return Example(ids, features, probs, torch.from_numpy(chosen)[None])


def losses(output: TrainingOutput, example: Example, t2d: Tensor, tv_share: float) -> tuple[Tensor, Tensor]:
    """(total loss, acceptance 1 - TV of each draft [A, B]) of one example.

    CE is weighed by (1 - tv_share) and TV by tv_share, so a run can move from one to the other; BCE of the confidence
    against the acceptance, without gradient through it (paper, training loss). t2d [V]: draft id of a token, or -1.
    """
    logits = output.logits
    block = logits.shape[2]
    length = example.ids.shape[1]
    wanted = example.anchors.unsqueeze(-1) + 1 + torch.arange(block)
    valid = (wanted < length)[0]
    labels = gather_rows(example.ids, wanted.clamp(max=length - 1))[0]
    target_probs = example.target_probs[(wanted[0] - 1).clamp(max=length - 1)]  # row j-1 judges the token at j
    log_probs = logits[0].log_softmax(dim=-1)
    distance = (log_probs.exp() - target_probs).abs().sum(dim=-1)  # 2 TV
    accept = (1 - 0.5 * distance).clamp(0, 1)
    weight = torch.exp(-torch.arange(block) / POSITION_DECAY) * valid
    draft_labels = t2d[labels]
    known = (draft_labels >= 0) & valid
    ce = -log_probs.gather(-1, draft_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    total = weight.sum()
    loss = (1 - tv_share) * (ce * weight * known).sum() / total + tv_share * (distance * weight).sum() / total
    if output.confidence is not None:
        bce = F.binary_cross_entropy_with_logits(output.confidence[0], accept.detach(), reduction="none")
        loss = loss + (bce * weight).sum() / total
    return loss, torch.where(valid, accept, torch.nan).detach()


class Trainer:
    """A model, its optimisers and its place in the schedule; saves and resumes all of it."""

    def __init__(self, config: DrafterConfig, model: DSpark, options: TrainOptions) -> None:
        self.config, self.model, self.options = config, model, options
        self.progress = Progress()
        for frozen in (model.embed_tokens, model.lm_head):
            frozen.requires_grad_(False)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in trained if p.ndim == 2 and ("layers." in n or n == "fc.weight")]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in trained if id(p) not in chosen]
        # Muon for the matrices between hidden states, Adam for norms and heads.
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._base_lr = [group["lr"] for o in self.optimisers for group in o.param_groups]

    @property
    def done(self) -> float:
        """Share of the schedule that is behind us, 0 to 1."""
        return min(1.0, self.progress.seconds / (self.options.hours * 3600))

    @property
    def rows(self) -> int:
        short = min(self.options.short_rows, self.config.block_rows)
        return short if self.done < self.options.short_share else self.config.block_rows

    @property
    def tv_share(self) -> float:
        """CE teaches quickly, TV is what acceptance is: move over during the last two fifths."""
        return 0.1 + 0.8 * min(1.0, max(0.0, (self.done - 0.6) / 0.2))

    def step(self, example: Example, t2d: Tensor) -> None:
        began = time.perf_counter()
        self._set_rates()
        output = self.model.training_forward(example.features, example.ids, example.anchors, rows=self.rows)
        loss, accept = losses(output, example, t2d, self.tv_share)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._count(time.perf_counter() - began, float(loss.detach()), float(accept[:, 0].nanmean()), accept.shape[0])

    def _set_rates(self) -> None:
        warm = min(1.0, self.done / self.options.warmup) if self.options.warmup else 1.0
        factor = max(0.01, warm * 0.5 * (1 + math.cos(math.pi * self.done)))
        groups = [g for o in self.optimisers for g in o.param_groups]
        for group, lr in zip(groups, self._base_lr, strict=True):
            group["lr"] = lr * factor

    def _count(self, seconds: float, loss: float, accept: float, positions: int) -> None:
        p = self.progress
        keep = 0.98 if p.steps else 0.0
        p.seconds, p.steps, p.positions = p.seconds + seconds, p.steps + 1, p.positions + positions
        p.loss, p.accept = keep * p.loss + (1 - keep) * loss, keep * p.accept + (1 - keep) * accept

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader never sees half of one."""
        state: dict[str, Any] = {
            "model": {
                k: v for k, v in self.model.state_dict().items() if not k.startswith(("embed_tokens", "lm_head"))
            },
            "optimisers": [o.state_dict() for o in self.optimisers],
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)  # tensors and plain containers only, never code
        self.model.load_state_dict(state["model"], strict=False)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def shuffled(corpus: Corpus, generator: np.random.Generator) -> Iterator[Span]:
    """Spans for ever, a new order each time round."""
    while True:
        corpus.refresh()
        spans = list(corpus.spans)
        for i in generator.permutation(len(spans)):
            yield spans[int(i)]


def train(
    trainer: Trainer,
    corpus: Corpus,
    t2d: Tensor,
    checkpoint: Path,
    report: Callable[[Progress], None],
    *,
    save_every_s: float = 120.0,
) -> None:
    """Run to the end of the schedule, saving on the way and at the end."""
    options = trainer.options
    if options.threads:
        torch.set_num_threads(options.threads)
    if checkpoint.exists():
        trainer.resume(checkpoint)
    generator = np.random.default_rng([options.seed, trainer.progress.steps])
    saved = trainer.progress.seconds
    for span in shuffled(corpus, generator):
        if trainer.done >= 1.0:
            break
        trainer.step(corpus.example(span, options.anchors, generator), t2d)
        report(trainer.progress)
        if trainer.progress.seconds - saved > save_every_s:
            trainer.save(checkpoint)
            saved = trainer.progress.seconds
    trainer.save(checkpoint)


@torch.inference_mode()
def evaluate(model: DSpark, corpus: Corpus, t2d: Tensor, *, anchors: int = 64, seed: int = 0) -> list[float]:
    """Mean acceptance (1 - TV, teacher forced) of each position of the block, over held-out documents."""
    generator = np.random.default_rng(seed)
    rows = []
    for span in corpus.spans:
        example = corpus.example(span, anchors, generator)
        output = model.training_forward(example.features, example.ids, example.anchors)
        rows.append(losses(output, example, t2d, 1.0)[1])
    return [float(x) for x in torch.cat(rows).nanmean(dim=0)]
