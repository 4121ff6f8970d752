"""A small model of the same vocabulary as a drafter: it continues the text by itself, one token a pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_cli.backends.base import Draft, Drafter, DraftRequest, FloatArray, Row, Target


class StandaloneDrafter(Drafter):
    """Drafts with any `Target`-like model. It needs no features, only the committed tokens.

    What it drafted stays in its cache: if the target accepts it, those tokens need no second pass.
    """

    kind = "small"

    def __init__(self, model: Target, *, n_vocab: int, block_size: int = 8) -> None:
        self.model = model
        self.name = model.info.name
        self.block_size = block_size
        self._n_vocab = n_vocab
        self._committed: dict[int, list[int]] = {}  # what the target has
        self._cached: dict[int, list[int]] = {}  # what our own cache has: committed tokens and our drafts

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in requests]
        confidence: list[list[float]] = [[] for _ in requests]
        probs: list[list[FloatArray]] = [[] for _ in requests]
        active = [i for i, request in enumerate(requests) if request.block > 0]
        pending = {i: self._catch_up(requests[i]) for i in active}
        while active:
            logits = self._pass([(requests[i].seq, pending[i]) for i in active])
            for i, row in zip(active, logits, strict=True):
                token = self._choose(requests[i], row, tokens[i], confidence[i], probs[i])
                tokens[i].append(token)
                pending[i] = [token]
            active = [i for i in active if len(tokens[i]) < min(requests[i].block, self.block_size)]
        return [
            Draft(
                np.asarray(tokens[i], dtype=np.int64),
                np.asarray(confidence[i], dtype=np.float32),
                np.stack(probs[i]) if probs[i] else None,
                self.kind,
            )
            for i in range(len(requests))
        ]

    def _choose(
        self,
        request: DraftRequest,
        row: FloatArray,
        drafted: list[int],
        confidence: list[float],
        probs: list[FloatArray],
    ) -> int:
        """The next draft token. Confidence is the highest probability, known before the token is drawn.

        (Were it the probability of the drawn token, a schedule that looks at it would bias the output.)
        """
        token, prob = (row.argmax(), None) if request.choose is None else request.choose(row, drafted, None)
        if prob is None:
            confidence.append(float(1.0 / np.exp(row - row.max()).sum()))
        else:
            confidence.append(float(prob.max()))
            probs.append(prob)
        return int(token)

    def _catch_up(self, request: DraftRequest) -> list[int]:
        """Rewind to what is committed and return the tokens that still need a pass, the anchor last."""
        wanted = [*self._committed.get(request.seq, []), request.anchor]
        cached = self._cached.get(request.seq, [])
        same = common_prefix(cached, wanted[:-1])
        self.model.rewind(request.seq, same)
        self._cached[request.seq] = wanted[:same]
        missing = wanted[same:]
        while len(missing) > self.model.max_rows:
            chunk, missing = missing[: self.model.max_rows], missing[self.model.max_rows :]
            self._step([(request.seq, chunk)], n_logits=0)
        return missing

    def _pass(self, work: list[tuple[int, list[int]]]) -> list[FloatArray]:
        """One pass over all sequences; logits [V of the target] after the last token of each."""
        rows: list[FloatArray] = []
        batch: list[tuple[int, list[int]]] = []
        for item in work:
            if batch and sum(len(t) for _, t in batch) + len(item[1]) > self.model.max_rows:
                rows += self._step(batch, n_logits=1)
                batch = []
            batch.append(item)
        return rows + self._step(batch, n_logits=1)

    def _step(self, work: list[tuple[int, list[int]]], n_logits: int) -> list[FloatArray]:
        outputs = self.model.step([Row(seq, tokens, n_logits) for seq, tokens in work])
        for seq, tokens in work:
            self._cached[seq].extend(tokens)
        return [self._to_target_width(output.logits[0]) for output in outputs] if n_logits else []

    def _to_target_width(self, row: FloatArray) -> FloatArray:
        """Vocabularies of one family may be padded differently: cut, or fill with -inf. A copy, as the pass is reused."""
        if len(row) >= self._n_vocab:
            return row[: self._n_vocab].copy()
        return np.concatenate([row, np.full(self._n_vocab - len(row), -np.inf, dtype=np.float32)])

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        self._committed.setdefault(seq, []).extend(tokens)

    def rewind(self, seq: int, length: int) -> None:
        del self._committed.setdefault(seq, [])[length:]

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self._committed[destination] = list(self._committed.get(source, []))[:length]
        cached = self._cached.get(source, [])
        size = common_prefix(cached, self._committed[destination])
        self.model.fork(source, destination, size)
        self._cached[destination] = cached[:size]

    def close(self) -> None:
        self.model.close()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    size = min(len(first), len(second))
    a, b = np.asarray(first[:size], dtype=np.int64), np.asarray(second[:size], dtype=np.int64)
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else size
