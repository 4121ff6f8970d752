"""One padded pass over several sequences: where its rows stand, what they see, and how logits become tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.base import DraftRequest, FloatArray, IntArray
from dspark_cli.backends.torch.layers import Attend, attention
from dspark_cli.backends.torch.store import RowStore


class Span:
    """`rows` new rows a sequence, at positions starts[i] .. starts[i] + rows - 1, on top of what the store holds.

    positions: int64 [N, rows]
    stop:      positions in use, over all sequences
    """

    def __init__(self, store: RowStore, seqs: Sequence[int], starts: Sequence[int], rows: int) -> None:
        self.store, self.seqs, self.starts, self.rows = store, list(seqs), list(starts), rows
        self.stop = max(starts) + rows
        store.reserve(max(seqs) + 1, self.stop)
        self._slots = torch.tensor(self.seqs, device=store.device)
        first = torch.tensor(self.starts, device=store.device)
        self.positions = first.unsqueeze(1) + torch.arange(rows, device=store.device)

    def mask(self, window: int | None, *, causal: bool) -> Tensor | None:
        """bool [N, rows, stop], True = visible; None when every row sees every key.

        window: the layer sees only keys closer than this; causal: and (with a window) none after its own row.
        """
        if window is None and len(set(self.starts)) == 1:
            return None
        keys = torch.arange(self.stop, device=self.positions.device)
        queries = self.positions.unsqueeze(-1)
        visible = (keys <= self.positions[:, -1:].unsqueeze(-1)).expand(-1, self.rows, -1)
        if window is None:
            return visible
        visible = visible & ((queries - keys).abs() < window)
        return visible & (keys <= queries) if causal else visible

    def attend(self, keys_name: str, values_name: str, scale: float, mask: Tensor | None) -> Attend:
        """Write the rows' keys and values behind the context and attend to both."""

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            for name, new in ((keys_name, keys), (values_name, values)):
                self.store.put_at(name, self._slots, self.positions, new)
            cached_keys = self.store.view(keys_name, self.seqs, self.stop)
            cached_values = self.store.view(values_name, self.seqs, self.stop)
            return attention(queries, cached_keys, cached_values, scale, mask)

        return attend


class Vocabulary:
    """Draft-vocabulary logits and target ids. V = target vocabulary, W = draft vocabulary.

    A target whose vocabulary is smaller than the drafter's (padding) never gets an id it does not have.
    """

    def __init__(self, n_vocab: int, draft_vocab: int, d2t: Tensor | None) -> None:
        self.n_vocab = n_vocab
        self._d2t = d2t
        ids = np.arange(draft_vocab) if d2t is None else d2t.cpu().numpy()
        self._ids = ids
        self._unknown = torch.from_numpy(ids >= n_vocab) if (ids >= n_vocab).any() else None
        self._whole = draft_vocab == n_vocab and d2t is None

    @property
    def complete(self) -> bool:
        """Whether the target has every token that the drafter knows, so that the best one is always allowed."""
        return self._unknown is None

    def best(self, k: int, logits: Tensor) -> Tensor:
        """The best target id [N] of logits [N, W] (a `Pick`)."""
        del k
        if self._unknown is not None:
            logits = logits.masked_fill(self._unknown.to(logits.device), float("-inf"))
        best = logits.argmax(dim=-1)
        return best if self._d2t is None else self._d2t[best]

    def known(self, logits: Tensor) -> tuple[FloatArray, IntArray | None]:
        """(float32 [W'] of one row of logits [W], the target ids they are of; None = all, in order)."""
        row: FloatArray = logits.float().cpu().numpy()
        if self._whole:
            return row, None
        if self._unknown is None:
            return row, self._ids
        return row[self._ids < self.n_vocab], self._ids[self._ids < self.n_vocab]


class Picker:
    """Chooses a block's tokens where some request samples (a `Pick`), and keeps the distributions."""

    def __init__(self, requests: Sequence[DraftRequest], vocabulary: Vocabulary) -> None:
        self._requests, self._vocabulary = requests, vocabulary
        self._drafted: list[list[int]] = [[] for _ in requests]
        self._probs: list[list[FloatArray]] = [[] for _ in requests]

    @classmethod
    def wanted(cls, requests: Sequence[DraftRequest], vocabulary: Vocabulary) -> Picker | None:
        """A picker if any request samples; greedy drafts need none."""
        return cls(requests, vocabulary) if any(request.choose is not None for request in requests) else None

    def __call__(self, k: int, logits: Tensor) -> Tensor:
        """Target ids [N] from corrected logits [N, W] of position k."""
        chosen = self._vocabulary.best(k, logits)
        for i, request in enumerate(self._requests):
            if request.choose is not None and k < request.block:
                row, ids = self._vocabulary.known(logits[i])
                token, probs = request.choose(row, self._drafted[i], ids)
                self._drafted[i].append(token)
                if probs is not None:
                    self._probs[i].append(probs)
                chosen[i] = token
        return chosen

    def probs(self, i: int) -> FloatArray | None:
        """float32 [k, V] of request i; None if the output does not hang on what its draft was sampled from."""
        return np.stack(self._probs[i]) if self._probs[i] else None
