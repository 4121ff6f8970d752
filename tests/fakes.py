"""Tiny targets and drafters in numpy: small enough to know their exact law, quick enough to draw thousands of answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_cli.backends.base import (
    Draft,
    Drafter,
    DraftRequest,
    FloatArray,
    Row,
    RowOutput,
    Target,
    TargetInfo,
    Tokenizer,
)


class FakeTokenizer(Tokenizer):
    """Token i is the letter chr(97 + i)."""

    def __init__(self, n_vocab: int, eog: frozenset[int] = frozenset()) -> None:
        self.n_vocab, self.bos_id, self.eog_ids = n_vocab, None, eog

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        return [ord(c) - 97 for c in text]

    def token_bytes(self, token: int) -> bytes:
        return b"" if token in self.eog_ids else bytes([97 + token])


class TableTarget(Target):
    """A random target: logits depend on the last two tokens through a table [V, V, V]. Features: one-hot of the token."""

    def __init__(
        self, n_vocab: int = 4, *, seed: int = 0, n_seq: int = 1, n_ctx: int = 64, spread: float = 1.0
    ) -> None:
        self.table = (np.random.default_rng(seed).normal(size=(n_vocab, n_vocab, n_vocab)) * spread).astype(np.float32)
        self.info = TargetInfo("table", "", "fake", "fp32", "cpu", n_vocab, n_vocab, 2, n_ctx, n_seq)
        self.tokenizer = FakeTokenizer(n_vocab)
        self.cache: dict[int, list[int]] = {s: [] for s in range(n_seq)}
        self.computed = 0
        self.max_rows = 64
        self.layers: tuple[int, ...] = ()

    def render_chat(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        return "".join(m["content"] for m in messages)

    def request_features(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)

    def row(self, tokens: Sequence[int]) -> FloatArray:
        """Logits [V] after `tokens`."""
        before = tokens[-2] if len(tokens) > 1 else 0
        return self.table[before, tokens[-1]]

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        assert sum(len(r.tokens) for r in rows) <= self.max_rows
        outputs = []
        for row in rows:
            cache, logits = self.cache[row.seq], []
            for token in row.tokens:
                cache.append(int(token))
                logits.append(self.row(cache))
            assert len(cache) <= self.info.n_ctx, "the engine wrote past the context"
            self.computed += len(row.tokens)
            count = len(row.tokens) if row.n_logits is None else row.n_logits
            features = np.eye(self.info.n_vocab, dtype=np.float32)[list(row.tokens)] if self.layers else None
            outputs.append(RowOutput(np.stack(logits)[len(logits) - count :], features))
        return outputs

    def length(self, seq: int) -> int:
        return len(self.cache[seq])

    def rewind(self, seq: int, length: int) -> None:
        del self.cache[seq][length:]

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.cache[destination] = self.cache[source][:length]

    def close(self) -> None:
        pass


class TableDrafter(Drafter):
    """Drafts from its own table [V, V]; greedy, or sampled when asked. Asserts that it is told exactly what is committed.

    peek: a confidence that looks at the drawn token (wrong: see tests/test_exactness.py).
    """

    name = kind = "table"

    def __init__(self, target: TableTarget, *, seed: int = 1, block_size: int = 3, peek: bool = False) -> None:
        n = target.info.n_vocab
        self.table = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
        self.block_size = block_size
        self.feature_layers = (0,)
        self.peek = peek
        self.seen: dict[int, list[int]] = {}
        self._target = target

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._propose(r) for r in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        assert self.seen.get(request.seq, []) == self._target.cache[request.seq]
        tokens: list[int] = []
        probs, confidence = [], []
        previous = request.anchor
        for _ in range(request.block):
            row = self.table[previous]
            own = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            token, prob = (int(row.argmax()), None) if request.choose is None else request.choose(row, tokens, None)
            if prob is not None:
                probs.append(prob)
            shown = own if prob is None else prob
            confidence.append(float(shown[token] if self.peek else shown.max()))
            tokens.append(token)
            previous = token
        return Draft(
            np.asarray(tokens, dtype=np.int64),
            np.asarray(confidence, dtype=np.float32),
            np.stack(probs) if probs else None,
            self.kind,
        )

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        assert features is not None
        assert features.argmax(axis=1).tolist() == list(tokens), "features do not belong to the committed tokens"
        self.seen.setdefault(seq, []).extend(tokens)

    def rewind(self, seq: int, length: int) -> None:
        del self.seen.setdefault(seq, [])[length:]

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.seen[destination] = self.seen[source][:length]
