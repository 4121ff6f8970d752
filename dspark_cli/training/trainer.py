"""Trains a drafter on a feature cache.

Samples per second is what counts on a small machine: every answer position of a document may be an anchor, all blocks
share the document's context keys, and the first part of the time goes to short blocks, the full block last.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.torch.anchors import TrainingOutput
from dspark_cli.backends.torch.devices import is_out_of_memory
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.backends.torch.loss import position_weights
from dspark_cli.kernels.distribution_loss import distribution_loss
from dspark_cli.training.corpus import Corpus, Example, TargetHead
from dspark_cli.training.device import quick_bfloat16

DECAY = 4.0  # weight of position i of a block is exp(-i / 4) (paper)
BORROWED = ("embed_tokens", "lm_head")  # the target's own: neither trained nor saved


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    hours:        the cosine schedule's length; a resumed run goes on where it was
    budget:       the schedule's length in anchors instead, which no busy neighbour shortens; 0 = hours count
    documents:    per step;  anchors: per document (most are shorter: then every position is one)
    short_share:  share of the time spent on blocks of `short_rows`
    """

    hours: float = 1.0
    budget: int = 0
    documents: int = 8
    anchors: int = 192
    short_share: float = 0.4
    short_rows: int = 2
    lr: float = 2e-3
    muon_lr: float = 0.02
    warmup: float = 0.02
    seed: int = 0


@dataclass
class Progress:
    """What a run reports: seconds of training so far, positions seen, and running means.

    accept: 1 - TV of the first draft token
    """

    seconds: float = 0.0
    steps: int = 0
    positions: int = 0
    loss: float = 0.0
    accept: float = 0.0


@dataclass(frozen=True)
class Judged:
    """Blocks of N documents against the target.

    total: the loss, a mean over documents;  accept_rate [N, A, B]: 1 - TV, 0 where nothing counts;  valid [N, A, B]
    """

    total: Tensor
    accept_rate: Tensor
    valid: Tensor


def judge(output: TrainingOutput, example: Example, head: TargetHead, tv_share: float) -> Judged:
    """Loss of A blocks of each document: (1 - tv_share) of cross entropy against the target's whole distribution (it
    says more about a position than the one token that came, which counts where texts are few), tv_share of sum|q - p|,
    and the confidence's BCE against 1 - TV; weighted by position as in the paper.
    """
    (count, length), block = example.ids.shape, output.logits.shape[2]
    wanted = example.anchors.unsqueeze(-1) + 1 + torch.arange(block, device=example.anchors.device)  # [N, A, B]
    valid = (wanted < example.lengths.view(-1, 1, 1)) & example.kept.unsqueeze(-1)
    documents = torch.arange(count, device=wanted.device).view(-1, 1, 1)
    judges = documents * length + (wanted - 1).clamp(max=length - 1)  # the row of the token before judges a token
    with torch.no_grad():
        probs, outside = head.probabilities(example.hidden, example.norms)
    weights = position_weights(valid, DECAY)
    weights = weights / weights.sum(dim=(1, 2), keepdim=True) / count
    shares = torch.stack([weights * (1 - tv_share), weights * tv_share], dim=-1)
    total, l1 = distribution_loss(
        output.logits.flatten(0, 2), probs.flatten(0, 1), judges.flatten(), outside.flatten(), shares.flatten(0, 2)
    )
    accept = ((1 - 0.5 * l1).clamp(0, 1)).view_as(valid) * valid
    if output.confidence is not None:
        bce = F.binary_cross_entropy_with_logits(output.confidence.float(), accept, reduction="none")
        total = total + (bce * weights).sum()
    return Judged(total, accept, valid)


class Trainer:
    """A model, its optimisers and its place in the schedule; saves and resumes all of it."""

    def __init__(self, model: DSpark | Eagle3, head: TargetHead, options: TrainOptions) -> None:
        self.model, self.options = model, options
        self.progress = Progress()
        self.device = model.fc.weight.device
        for frozen in (model.embed_tokens, model.lm_head):
            frozen.requires_grad_(False)
        if quick_bfloat16(self.device):  # autocast would cast the frozen head anew for every document
            model.lm_head.bfloat16()
            head = replace(head, rows=head.rows.bfloat16())
        self.head = head
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in trained if p.ndim == 2 and ("layers." in n or n == "fc.weight")]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in trained if id(p) not in chosen]
        # Muon for the matrices between hidden states, Adam for norms and heads.
        if not hasattr(torch.optim, "Muon"):
            raise DsparkError(
                f"training needs torch 2.9 or newer, this is {torch.__version__}", hint="pip install -U torch"
            )
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self._trained = [*matrices, *others]
        self._base_lr = [group["lr"] for o in self.optimisers for group in o.param_groups]

    @property
    def done(self) -> float:
        """Share of the schedule that is behind us, 0 to 1."""
        return min(1.0, self.spent / self.schedule)

    @property
    def schedule(self) -> float:
        """Its length: anchors, or seconds."""
        return self.options.budget or self.options.hours * 3600

    @property
    def spent(self) -> float:
        """What is behind us, in the same unit."""
        return self.progress.positions if self.options.budget else self.progress.seconds

    @property
    def rows(self) -> int:
        whole = self.model.config.block_rows
        return min(self.options.short_rows, whole) if self.done < self.options.short_share else whole

    @property
    def tv_share(self) -> float:
        """The whole distribution teaches quickly, TV is what acceptance is: the run moves over in its second half."""
        return 0.1 + 0.8 * min(1.0, max(0.0, (self.done - 0.5) / 0.3))

    def step(self, examples: Iterable[Example]) -> None:
        """One step of the optimisers on the mean loss of all documents.

        Raises DsparkError, with the weights as they were, where loss or gradients are no numbers.
        """
        began = _clock(self.device)
        self._set_rates()
        totals, firsts, counts, positions = [], [], [], []
        for example in examples:
            with self.autocast():
                output = self.model.training_forward(example.features, example.ids, example.anchors, rows=self.rows)
                result = judge(output, example, self.head, self.tv_share)
            totals.append(result.total * len(example.ids))
            counts.append(len(example.ids))
            firsts.append(result.accept_rate[..., 0].sum())
            positions.append(example.kept.sum())
        loss = torch.stack(totals).sum() / sum(counts)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        value = float(loss.detach())
        if not math.isfinite(value + float(norm)):
            raise DsparkError(
                f"training diverged in step {self.progress.steps + 1}: loss {value:g}, gradient norm {float(norm):g}",
                hint="the same command goes on from the last checkpoint, with the texts in another order",
            )
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen = int(torch.stack(positions).sum())
        accept = float(torch.stack(firsts).sum()) / max(1, seen)
        self._count(_clock(self.device) - began, value, accept, seen)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 products where the machine has them; weights and optimisers stay float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=quick_bfloat16(self.device))

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

    def weights(self) -> dict[str, Tensor]:
        """The trained weights and buffers, without what is borrowed from the target."""
        return {k: v for k, v in self.model.state_dict().items() if not k.startswith(BORROWED)}

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader never sees half of one."""
        state: dict[str, Any] = {
            "model": self.weights(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> None:
        """Go on where `path` was saved. Raises DsparkError for a damaged file; what it holds is never run."""
        try:
            # tensors and plain containers, never code
            state = torch.load(path, weights_only=True, map_location=self.device)
            self.model.load_state_dict(state["model"], strict=False)
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.progress = Progress(**state["progress"])
        except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise DsparkError(
                f"{path} cannot be used: {said}", hint=f"rm {path}: training begins anew, texts and features are kept"
            ) from None

    def run(self, corpus: Corpus, checkpoint: Path, *, save_every_s: float = 120.0) -> Iterator[Progress]:
        """Train to the end of the schedule, saving on the way and at the end; yields after every step."""
        generator = np.random.default_rng([self.options.seed, self.progress.steps])
        draws = corpus.draws(generator, self.options.documents)
        saved = self.progress.seconds
        while self.done < 1.0:
            self.step(corpus.examples(next(draws), self.options.anchors, generator))
            if self.progress.seconds - saved > save_every_s:
                self.save(checkpoint)
                saved = self.progress.seconds
            yield self.progress
        self.save(checkpoint)


def _clock(device: torch.device) -> float:
    """Seconds. On a CPU: of this process's own time by thread, so that a busy or stopped machine trains no less."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


@torch.inference_mode()
def acceptance(trainer: Trainer, corpus: Corpus, *, documents: int = 64, seed: int = 0) -> list[float]:
    """Mean acceptance (1 - TV, teacher forced) of each position of the block, over documents of `corpus`."""
    generator = np.random.default_rng(seed)
    total, count = 0.0, 0.0
    for example in corpus.examples(corpus.stretches[:documents], 64, generator):
        with trainer.autocast():
            output = trainer.model.training_forward(example.features, example.ids, example.anchors)
            result = judge(output, example, trainer.head, 0.9)
        total = total + result.accept_rate.sum((0, 1))
        count = count + result.valid.sum((0, 1))
    return [float(x) for x in total / count]  # type: ignore[attr-defined]
