"""DSpark and DFlash drafters of GGUF files (architecture `dflash`) beside a libllama target.

The drafter borrows embedding and output head of the target. `observe` injects target features as keys and values,
`propose` runs the block [anchor, mask, ...] and drops it again (DESIGN section 5); `passes` says who computes that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dspark_cli.backends.base import (
    EMPTY_DRAFT,
    Committed,
    Draft,
    Drafter,
    DraftRequest,
    FloatArray,
    IntArray,
    PairMismatch,
)
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.header import read_tensor, tensor_infos
from dspark_cli.backends.llamacpp.model import Model, tokens_agree
from dspark_cli.backends.llamacpp.passes import DraftPass, DraftRows, LibllamaPass, by_kernels
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.pairing import TargetFacts, check_gguf, refusal


def facts_of(target: Model) -> TargetFacts:
    """What a pair check must know of a loaded target."""
    theta = target.meta(f"{target.architecture}.rope.freq_base")
    return TargetFacts(
        name=target.path.name,
        n_vocab=target.n_vocab,
        n_embd=target.n_embd,
        n_layer=target.n_layer,
        last_layer=target.n_layer - 2,
        rope_theta=float(theta) if theta else None,
    )


class LlamaCppDrafter(Drafter):
    """A `dflash` GGUF as a drafter. `kind` is "dspark" when it carries a Markov head, else "dflash".

    kernels: whether our own kernels may run it where they can; else libllama does
    """

    def __init__(
        self,
        path: str | Path,
        target: LlamaCppTarget,
        options: ContextOptions | None = None,
        *,
        kernels: bool = True,
    ) -> None:
        options = options or ContextOptions(n_seq=target.info.n_seq)
        path = Path(path)
        facts = check_gguf(path, facts_of(target.model))
        self._heads = HeadWeights(path)
        ours = by_kernels(path, target, facts, options, self._heads.d2t) if kernels else None
        self.passes: DraftPass | None = None
        self.model = Model(path, gpu_layers=options.gpu_layers, vocab_only=ours is not None)
        try:
            agree, difference = tokens_agree(target.model, self.model)
            if not agree:
                raise refusal(facts.name, target.model.path.name, difference)
            self.passes = ours() if ours else LibllamaPass(self.model, target, facts, options, self._heads.d2t)
        except BaseException:
            self.close()
            raise
        self.name = path.name
        self.kind = facts.kind
        self.block_size = facts.block_size
        self.feature_layers = facts.layers
        self.has_confidence = self._heads.has_confidence
        self._skip = facts.rows - facts.block_size
        self._mask = facts.mask or 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        wanted = [min(request.block, self.block_size) for request in requests]
        block = max(wanted, default=0)
        if block < 1:
            return [EMPTY_DRAFT for _ in requests]
        width = block + self._skip
        share = self._passes.most_rows // width
        drafts: list[Draft] = []
        for begin in range(0, len(requests), share):
            group = slice(begin, begin + share)
            drafts += self._propose_together(requests[group], wanted[group], width)
        return drafts

    @property
    def _passes(self) -> DraftPass:
        assert self.passes is not None
        return self.passes

    def _propose_together(self, requests: Sequence[DraftRequest], wanted: Sequence[int], width: int) -> list[Draft]:
        """One pass of `width` rows for each request."""
        found = self._passes.block(requests, width, self._mask)
        drafts = []
        for i, (request, size) in enumerate(zip(requests, wanted, strict=True)):
            begin = i * width + self._skip
            drafts.append(self._read_block(request, found[begin : begin + size]))
        return drafts

    def _read_block(self, request: DraftRequest, rows: DraftRows) -> Draft:
        """One sequence's draft from its rows."""
        if request.choose is None:
            return Draft(rows.greedy, self._or_own_probability(rows.confidence, rows.logits), source=self.kind)
        return self._chosen(request, rows)

    def _or_own_probability(self, confidence: FloatArray | None, logits: FloatArray) -> FloatArray:
        """Without a confidence head, the probability of the drafter's own best token (known before any sampling)."""
        if confidence is not None:
            return confidence
        best = logits.max(axis=1, keepdims=True)
        return (1.0 / np.exp(logits - best).sum(axis=1)).astype(np.float32)

    def _chosen(self, request: DraftRequest, rows: DraftRows) -> Draft:
        """Draft what the request chooses: row k was corrected along the *best* tokens, so move it to the chosen ones."""
        choose: Callable[[FloatArray, list[int], IntArray | None], tuple[int, FloatArray | None]] = request.choose
        tokens: list[int] = []
        probs, survive = [], []
        for k, row in enumerate(rows.logits):
            conf = None if rows.confidence is None else float(rows.confidence[k])
            if k and self._heads.has_markov and tokens[-1] != rows.greedy[k - 1]:
                instead_of = int(rows.greedy[k - 1])
                row = row + self._heads.bias_change(tokens[-1], instead_of)
                conf = None if conf is None else self._heads.move_confidence(conf, tokens[-1], instead_of)
            survive.append(float(self._or_own_probability(None, row[None])[0]) if conf is None else conf)
            token, prob = choose(row, tokens, rows.ids)
            tokens.append(token)
            if prob is not None:
                probs.append(prob)
        return Draft(
            np.asarray(tokens, dtype=np.int64),
            np.asarray(survive, dtype=np.float32),
            np.stack(probs) if probs else None,
            self.kind,
        )

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        self.observe_all([(seq, tokens, features)])

    def observe_all(self, committed: Sequence[Committed]) -> None:
        seqs, positions, rows = [], [], []
        for seq, tokens, features in committed:
            if features is None:
                raise PairMismatch(f"{self.name} was given no target features")
            start, size = self.length(seq), len(tokens)
            seqs.append(np.full(size, seq))
            positions.append(np.arange(start, start + size))
            rows.append(features[:size])
        if sum(map(len, rows)):
            self._passes.take_in(_joined(seqs), _joined(positions), _joined(rows))

    def length(self, seq: int) -> int:
        """Tokens of `seq` that it has observed."""
        return self._passes.length(seq)

    def rewind(self, seq: int, length: int) -> None:
        self._passes.rewind(seq, length)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self._passes.fork(source, destination, length)

    def close(self) -> None:
        if self.passes is not None:
            self.passes.close()
        self.model.close()


def _joined(parts: Sequence[Any]) -> Any:
    """One array of several; without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class HeadWeights:
    """The Markov and confidence weights of a drafter GGUF as arrays, each read when it is first needed (all but `d2t` only to
    draft by sampling)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = tensor_infos(path)
        self.has_markov = "markov_w1.weight" in self._tensors
        self.has_confidence = self.has_markov and "conf_proj.weight" in self._tensors
        self.has_d2t = "d2t" in self._tensors

    def _array(self, name: str) -> Any:
        return read_tensor(self._path, self._tensors[name])

    @cached_property
    def _w1(self) -> FloatArray:
        return self._array("markov_w1.weight")  # type: ignore[no-any-return]

    @cached_property
    def _w2(self) -> FloatArray:
        return self._array("markov_w2.weight")  # type: ignore[no-any-return]

    @cached_property
    def _confidence_of_embedding(self) -> FloatArray:
        """The part of the confidence head that reads W1[prev]: the last `rank` weights."""
        return self._array("conf_proj.weight").reshape(-1)[-self._w1.shape[1] :]  # type: ignore[no-any-return]

    @cached_property
    def d2t(self) -> IntArray | None:
        """Target ids of a reduced draft vocabulary; None for a whole one."""
        return self._array("d2t").astype(np.int64) if self.has_d2t else None

    def bias_change(self, token: int, instead_of: int) -> FloatArray:
        """float32 [W]: W2 (W1[token] - W1[instead_of]), over the draft vocabulary."""
        return self._w2 @ (self._w1[token] - self._w1[instead_of])  # type: ignore[no-any-return]

    def move_confidence(self, confidence: float, token: int, instead_of: int) -> float:
        """The confidence had the previous draft token been `token`."""
        clipped = min(max(confidence, 1e-7), 1 - 1e-7)
        logit = np.log(clipped / (1 - clipped))
        logit += float(self._confidence_of_embedding @ (self._w1[token] - self._w1[instead_of]))
        return float(1 / (1 + np.exp(-logit)))
