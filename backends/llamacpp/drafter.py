"""DSpark and DFlash drafters run by libllama itself (GGUF architecture `dflash`), beside a libllama target.

The drafter borrows embedding and output head from the target's context. `observe` injects target features as keys and
values, `propose` runs the block [anchor, mask, ...] and drops it again (DESIGN section 5). The confidence head's answer
is element 0 of a row of the "nextn" output, already a sigmoid.
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
from dspark_cli.backends.llamacpp import native
from dspark_cli.backends.llamacpp.context import Context, ContextOptions
from dspark_cli.backends.llamacpp.header import read_tensor, tensor_infos
from dspark_cli.backends.llamacpp.model import Model, tokens_agree
from dspark_cli.backends.llamacpp.native import Batch, lib
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.pairing import DrafterFacts, TargetFacts, check_gguf, refusal


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


def to_width(logits: FloatArray, n_vocab: int) -> FloatArray:
    """Logits [n, any] cut or filled with -inf to [n, n_vocab]: vocabularies of one family may be padded differently."""
    if logits.shape[1] >= n_vocab:
        return logits[:, :n_vocab]
    return np.pad(logits, ((0, 0), (0, n_vocab - logits.shape[1])), constant_values=-np.inf)


class LlamaCppDrafter(Drafter):
    """A `dflash` GGUF as a drafter. `kind` is "dspark" when it carries a Markov head, else "dflash"."""

    def __init__(self, path: str | Path, target: LlamaCppTarget, options: ContextOptions | None = None) -> None:
        options = options or ContextOptions(n_seq=target.info.n_seq)
        self._target = target
        facts = check_gguf(Path(path), facts_of(target.model))
        self.model = Model(path, gpu_layers=options.gpu_layers)
        self.context: Any = None
        try:
            agree, difference = tokens_agree(target.model, self.model)
            if not agree:
                raise refusal(facts.name, target.model.path.name, difference)
            self._read_metadata(facts)
            n_ctx = target.info.n_ctx + self.block_size + 1
            self.context = Context(self.model, options.drafting(), n_ctx=n_ctx, other=target.context.handle)
            native.export("llama_set_embeddings_nextn")(self.context.handle, True, True)
            lib.llama_set_causal_attn(self.context.handle, self.model.meta("dflash.attention.causal") == "true")
            self.feature_layers = native.layer_ids(self.model.handle)
            self._inject = Batch(self.context.max_ubatch, width=len(self.feature_layers) * target.info.n_embd)
        except BaseException:
            self.close()
            raise
        self.name = self.model.path.name

    def _read_metadata(self, facts: DrafterFacts) -> None:
        self._heads = HeadWeights(self.model.path)
        self.kind = facts.kind
        self.has_confidence = self._heads.has_confidence
        self._skip = facts.rows - facts.block_size
        self.block_size = facts.block_size
        self._mask = facts.mask or 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        wanted = [min(request.block, self.block_size) for request in requests]
        block = max(wanted, default=0)
        if block < 1:
            return [EMPTY_DRAFT for _ in requests]
        width = block + self._skip
        share = self.context.max_ubatch // width  # a block may not be split between ubatches
        drafts: list[Draft] = []
        for begin in range(0, len(requests), share):
            group = slice(begin, begin + share)
            drafts += self._propose_together(requests[group], wanted[group], width)
        return drafts

    def _propose_together(self, requests: Sequence[DraftRequest], wanted: Sequence[int], width: int) -> list[Draft]:
        """One pass of `width` rows for each request."""
        self._draft_pass(requests, width)
        logits = to_width(self.context.logits(width * len(requests)), self._target.info.n_vocab)
        confidence = self._confidence(width * len(requests))
        drafts = []
        for i, (request, size) in enumerate(zip(requests, wanted, strict=True)):
            rows = slice(i * width + self._skip, i * width + self._skip + size)
            conf = None if confidence is None else confidence[rows].copy()
            drafts.append(self._read_block(request, logits[rows], conf))
        return drafts

    def _draft_pass(self, requests: Sequence[DraftRequest], width: int) -> None:
        """Decode [anchor, mask, ...] of every request in one pass and drop those positions again."""
        batch = self.context.batch
        starts = []
        for i, request in enumerate(requests):
            rows = slice(i * width, (i + 1) * width)
            start = self.context.length(request.seq)
            starts.append(start)
            batch.token[rows] = self._mask
            batch.token[rows.start] = request.anchor
            batch.pos[rows] = np.arange(start, start + width)
            batch.seq[rows] = request.seq
            batch.logits[rows] = 1
        self.context.decode(batch, width * len(requests))
        for request, start in zip(requests, starts, strict=True):
            self.context.rewind(request.seq, start)

    def _confidence(self, n_rows: int) -> FloatArray | None:
        if not self.has_confidence:
            return None
        pointer = native.export("llama_get_embeddings_nextn")(self.context.handle)
        return native.rows_at(pointer, n_rows, self.model.n_embd)[:, 0]

    def _read_block(self, request: DraftRequest, logits: FloatArray, confidence: FloatArray | None) -> Draft:
        """One sequence's draft from its rows of corrected logits [k, V]."""
        greedy = logits.argmax(axis=1)
        if request.choose is None:
            return Draft(greedy, self._or_own_probability(confidence, logits), source=self.kind)
        return self._chosen(request, logits, greedy, confidence)

    def _or_own_probability(self, confidence: FloatArray | None, logits: FloatArray) -> FloatArray:
        """Without a confidence head, the probability of the drafter's own best token (known before any sampling)."""
        if confidence is not None:
            return confidence
        best = logits.max(axis=1, keepdims=True)
        return (1.0 / np.exp(logits - best).sum(axis=1)).astype(np.float32)

    def _chosen(
        self, request: DraftRequest, logits: FloatArray, greedy: IntArray, confidence: FloatArray | None
    ) -> Draft:
        """Draft what the request chooses: libllama corrected row k along the *best* tokens, so move it to the chosen ones."""
        choose: Callable[[FloatArray, list[int], IntArray | None], tuple[int, FloatArray | None]] = request.choose
        ids = self._heads.d2t
        rows = logits if ids is None else logits[:, ids]
        tokens: list[int] = []
        probs, survive = [], []
        for k, row in enumerate(rows):
            conf = None if confidence is None else float(confidence[k])
            if k and self._heads.has_markov and tokens[-1] != greedy[k - 1]:
                row = row + self._heads.bias_change(tokens[-1], int(greedy[k - 1]))
                conf = None if conf is None else self._heads.move_confidence(conf, tokens[-1], int(greedy[k - 1]))
            survive.append(float(self._or_own_probability(None, row[None])[0]) if conf is None else conf)
            token, prob = choose(row, tokens, ids)
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
            start, size = self.context.length(seq), len(tokens)
            seqs.append(np.full(size, seq))
            positions.append(np.arange(start, start + size))
            rows.append(features[:size])
        batch, total = self._inject, sum(map(len, rows))
        if not total:
            return
        seq_of, position_of, features_of = (_joined(parts) for parts in (seqs, positions, rows))
        for begin in range(0, total, batch.capacity):
            chunk = slice(begin, min(begin + batch.capacity, total))
            size = chunk.stop - begin
            batch.embd[:size] = features_of[chunk]
            batch.pos[:size] = position_of[chunk]
            batch.seq[:size] = seq_of[chunk]
            self.context.decode(batch, size)

    def rewind(self, seq: int, length: int) -> None:
        self.context.rewind(seq, length)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.context.fork(source, destination, length)

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
        self.model.close()


def _joined(parts: Sequence[Any]) -> Any:
    """One array of several; without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class HeadWeights:
    """The Markov and confidence weights of a drafter GGUF as arrays: needed only to draft by sampling, so read late."""

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
