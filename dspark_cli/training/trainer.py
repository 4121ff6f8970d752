"""Trains a drafter on a feature cache.

Samples per second is what counts on a small machine: every answer position of a document may be an anchor, all blocks
share the document's context keys, and the first part of the time goes to short blocks, the full block last.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.torch.anchors import TrainingOutput, gather_rows
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.backends.torch.loss import Losses, LossSettings, drafter_losses
from dspark_cli.training.corpus import Corpus, Example, TargetHead

BORROWED = ("embed_tokens", "lm_head")  # the target's own: neither trained nor saved


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    hours:        the cosine schedule's length; a resumed run goes on where it was
    documents:    per step;  anchors: per document (most are shorter: then every position is one)
    short_share:  share of the time spent on blocks of `short_rows`
    """

    hours: float = 1.0
    documents: int = 4
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


def losses(output: TrainingOutput, example: Example, head: TargetHead, settings: LossSettings) -> Losses:
    """Losses of A blocks of one document against the target's distributions."""
    block, length = output.logits.shape[2], example.ids.shape[1]
    wanted = example.anchors.unsqueeze(-1) + 1 + torch.arange(block, device=example.anchors.device)  # [1, A, B]
    valid = wanted < length
    labels = head.t2d.to(example.ids.device)[gather_rows(example.ids, wanted.clamp(max=length - 1))]
    judges = (wanted - 1).clamp(max=length - 1)  # row j-1 judges the token at j
    with torch.no_grad():
        probs, outside = head.probabilities(example.hidden, example.norms)
    return drafter_losses(
        output.logits, output.confidence, probs[judges], labels, valid, settings, outside=outside[judges]
    )


class Trainer:
    """A model, its optimisers and its place in the schedule; saves and resumes all of it."""

    def __init__(self, model: DSpark | Eagle3, head: TargetHead, options: TrainOptions) -> None:
        self.model, self.head, self.options = model, head, options
        self.progress = Progress()
        self.device = model.fc.weight.device
        for frozen in (model.embed_tokens, model.lm_head):
            frozen.requires_grad_(False)
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
            torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._trained = [*matrices, *others]
        self._base_lr = [group["lr"] for o in self.optimisers for group in o.param_groups]

    @property
    def done(self) -> float:
        """Share of the schedule that is behind us, 0 to 1."""
        return min(1.0, self.progress.seconds / (self.options.hours * 3600))

    @property
    def rows(self) -> int:
        whole = self.model.config.block_rows
        return min(self.options.short_rows, whole) if self.done < self.options.short_share else whole

    @property
    def settings(self) -> LossSettings:
        """The whole distribution teaches quickly, TV is what acceptance is: the run moves over in its second half."""
        tv = 0.1 + 0.8 * min(1.0, max(0.0, (self.done - 0.5) / 0.3))
        return LossSettings(ce=0.0, kl=1 - tv, l1=tv)

    def step(self, examples: list[Example]) -> None:
        began = _clock(self.device)
        self._set_rates()
        results = []
        with self._fast():
            for example in examples:
                output = self.model.training_forward(example.features, example.ids, example.anchors, rows=self.rows)
                results.append(losses(output, example, self.head, self.settings))
        loss = sum((r.total for r in results), torch.zeros((), device=self.device)) / len(results)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        accept = float(torch.cat([r.accept_rate[0, :, 0] for r in results]).mean())
        positions = sum(e.anchors.shape[1] for e in examples)
        self._count(_clock(self.device) - began, float(loss.detach()), accept, positions)

    def _fast(self) -> contextlib.AbstractContextManager[Any]:
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
        state = torch.load(
            path, weights_only=True, map_location=self.device
        )  # tensors and plain containers, never code
        self.model.load_state_dict(state["model"], strict=False)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def run(self, corpus: Corpus, checkpoint: Path, *, save_every_s: float = 120.0) -> Iterator[Progress]:
        """Train to the end of the schedule, saving on the way and at the end; yields after every step."""
        generator = np.random.default_rng([self.options.seed, self.progress.steps])
        stretches = corpus.shuffled(generator)
        saved = self.progress.seconds
        while self.done < 1.0:
            chosen = islice(stretches, self.options.documents)
            self.step([corpus.example(s, self.options.anchors, generator) for s in chosen])
            if self.progress.seconds - saved > save_every_s:
                self.save(checkpoint)
                saved = self.progress.seconds
            yield self.progress
        self.save(checkpoint)


def _clock(device: torch.device) -> float:
    """Seconds. On a CPU: of this process's own time by thread, so that a busy or stopped machine trains no less."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


def quick_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are worth it there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and _cpu_bfloat16()


def _cpu_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones: asked of the machine, once."""
    global _answer
    if _answer is None:
        _answer = _seconds(torch.bfloat16) < 0.7 * _seconds(torch.float32)
    return _answer


_answer: bool | None = None


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return min(times)


@torch.inference_mode()
def acceptance(trainer: Trainer, corpus: Corpus, *, documents: int = 64, seed: int = 0) -> list[float]:
    """Mean acceptance (1 - TV, teacher forced) of each position of the block, over documents of `corpus`."""
    generator = np.random.default_rng(seed)
    total, count = 0.0, 0.0
    for stretch in corpus.stretches[:documents]:
        example = corpus.example(stretch, 64, generator)
        with trainer._fast():
            output = trainer.model.training_forward(example.features, example.ids, example.anchors)
            result = losses(output, example, trainer.head, LossSettings())
        total = total + result.accept_rate[0].sum(0)
        count = count + (result.weights[0] > 0).sum(0)
    return [float(x) for x in total / count]  # type: ignore[attr-defined]
