"""Torch drafters behind the `Drafter` contract: features come in as arrays from any target, drafts go out as arrays.

Context keys and values are kept per sequence and extended by `observe`, never recomputed. `propose` drafts for all its
requests in one padded pass (Eagle3: one a step). What a pass wrote past a sequence's length is dead afterwards.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.base import EMPTY_DRAFT, Committed, Draft, Drafter, DraftRequest, DsparkError, FloatArray
from dspark_cli.backends.torch.checkpoint import TargetTables, check_pair, load_drafter, read_shapes
from dspark_cli.backends.torch.devices import detect, is_out_of_memory
from dspark_cli.backends.torch.dialects import read_config
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.backends.torch.folder import out_of_memory
from dspark_cli.backends.torch.layers import Attend
from dspark_cli.backends.torch.passes import Picker, Span, Vocabulary
from dspark_cli.backends.torch.store import RowStore


def open_drafter(
    folder: Path,
    *,
    n_vocab: int,
    n_embd: int,
    n_layer: int,
    same_tokens: bool = False,
    tables: TargetTables | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> TorchDrafter:
    """The drafter in `folder` for a target of these sizes.

    Raises BadCheckpoint for a checkpoint that cannot be used, PairMismatch for one that belongs to another target,
    NotReady (exit code 3) where its weights do not fit.
    same_tokens: the caller compared the tokenizers, so the vocabularies may differ by padding.
    """
    config = read_config(folder)  # the pair is checked before its weights are read
    check_pair(
        config,
        n_vocab=n_vocab,
        n_embd=n_embd,
        n_layer=n_layer,
        depth=n_layer,
        same_tokens=same_tokens,
        name=folder.name,
    )
    try:
        model = load_drafter(folder, tables=tables, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        needed = sum(map(prod, read_shapes(folder).values())) * dtype.itemsize
        free = next((facts.free for facts in detect() if facts.torch_name == str(device)), 0)
        raise out_of_memory(f"the drafter {folder.name}", needed, free, hint="--drafter lookup needs nothing") from None
    return make_drafter(model, name=folder.name, n_vocab=n_vocab)


def make_drafter(model: DSpark | Eagle3, *, name: str, n_vocab: int | None = None) -> TorchDrafter:
    """A `Drafter` around a loaded model; n_vocab: the target's, where it differs from the model's by padding."""
    if isinstance(model, Eagle3):
        return Eagle3Drafter(model, name, n_vocab)
    return DSparkDrafter(model, name, n_vocab)


class TorchDrafter(Drafter):
    """What the torch drafters share: the store, the checks, the way from logits to `Draft`s."""

    store: RowStore
    #: is told, in one line, what the user may want to know
    notice: Callable[[str], None] = staticmethod(lambda text: None)
    #: whether memory ran out: from then on it drafts nothing, and decoding goes on without it
    spent = False

    def __init__(self, model: DSpark | Eagle3, name: str, n_vocab: int | None) -> None:
        config = model.config
        self.name, self.kind, self.block_size = name, config.kind, config.block_size
        self.feature_layers = config.target_layer_ids
        self.config = config
        self.vocabulary = Vocabulary(n_vocab or config.vocab_size, config.draft_vocab_size, model.d2t)
        self.weight = model.fc.weight

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = [EMPTY_DRAFT] * len(requests)
        able = [i for i, request in enumerate(requests) if request.block > 0 and self._can_draft(request.seq)]
        if able and not self.spent:
            with self._memory(), torch.inference_mode():
                for i, draft in zip(able, self._draft([requests[i] for i in able]), strict=True):
                    drafts[i] = draft
        return drafts

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        self.observe_all([(seq, tokens, features)])

    def observe_all(self, committed: Sequence[Committed]) -> None:
        some = [part for part in committed if len(part[1])]
        if some and not self.spent:
            with self._memory(), torch.inference_mode():
                self._take(some)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Give up drafting, not the answer, when an allocation fails."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.spent = True
            self.store.clear()
            self.notice(f"the drafter {self.name} ran out of memory: decoding goes on without it")

    @abstractmethod
    def _take(self, committed: Sequence[Committed]) -> None:
        """`observe_all` of at least one sequence, each with at least one token."""

    def rewind(self, seq: int, length: int) -> None:
        self.store.rewind(seq, length)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.store.fork(source, destination, length)

    def length(self, seq: int) -> int:
        """Rows of `seq` in the cache."""
        return self.store.length(seq)

    def close(self) -> None:
        self.store.clear()

    def _can_draft(self, seq: int) -> bool:
        del seq
        return True

    @abstractmethod
    def _draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Drafts for requests that all want at least one token."""

    def _tensor(self, features: FloatArray | None, count: int) -> Tensor:
        """Features [count, m*d] on the model's device, or an error that names the shapes."""
        needed = (count, self.config.feature_width)
        if features is None or features.shape != needed:
            found = None if features is None else features.shape
            raise DsparkError(f"drafter {self.name}: features of shape {found}, needs {needed}")
        return torch.as_tensor(np.ascontiguousarray(features)).to(self.weight)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.weight.device)

    def _new_store(self, rows: dict[str, tuple[int, ...]]) -> RowStore:
        return RowStore(rows, dtype=self.weight.dtype, device=self.weight.device)

    def _drafts(
        self, requests: Sequence[DraftRequest], tokens: Tensor, confidence: Tensor | None, picker: Picker | None
    ) -> list[Draft]:
        """Cut tokens [N, k] and confidence logits [N, k] to what each request asked for."""
        ids = tokens.cpu().numpy()
        sure = None if confidence is None else torch.sigmoid(confidence.float()).cpu().numpy()
        drafts = []
        for i, request in enumerate(requests):
            length = min(request.block, ids.shape[1])
            probs = None if picker is None else picker.probs(i)
            drafts.append(Draft(ids[i, :length], None if sure is None else sure[i, :length], probs, self.kind))
        return drafts


class DSparkDrafter(TorchDrafter):
    """DSpark and DFlash: one pass a round."""

    def __init__(self, model: DSpark, name: str, n_vocab: int | None = None) -> None:
        super().__init__(model, name, n_vocab)
        self.model = model
        row = (self.config.num_kv_heads, self.config.head_dim)
        self.store = self._new_store({f"{what}{i}": row for i in range(self.config.num_layers) for what in "kv"})

    def _take(self, committed: Sequence[Committed]) -> None:
        fused = self.model.fuse(torch.cat([self._tensor(features, len(tokens)) for _, tokens, features in committed]))
        sizes = [len(tokens) for _, tokens, _ in committed]
        seqs = [seq for seq, _, _ in committed]
        starts = [self.store.length(seq) for seq in seqs]
        last = max(start + size for start, size in zip(starts, sizes, strict=True))
        self.store.reserve(max(seqs) + 1, last)
        positions = self._ids(
            [p for start, size in zip(starts, sizes, strict=True) for p in range(start, start + size)]
        )
        rope = self.model.rotary(positions, last)
        for i, made in enumerate(self.model.context_keys_values(fused.unsqueeze(0), rope)):
            for what, rows in zip("kv", made, strict=True):
                for seq, part in zip(seqs, rows[0].split(sizes), strict=True):
                    self.store.put(f"{what}{i}", seq, part)
        for seq, size in zip(seqs, sizes, strict=True):
            self.store.advance(seq, size)

    def _draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        length = min(max(request.block for request in requests), self.block_size)
        anchors = self._ids([request.anchor for request in requests])
        hidden = self.model.drafting_rows(self._block([request.seq for request in requests], anchors))
        picker = Picker.wanted(requests, self.vocabulary)
        best = None if self.vocabulary.complete else self.vocabulary.best
        tokens, confidence = self.model.chain(hidden, anchors, length, picker or best)
        return self._drafts(requests, tokens, confidence, picker)

    def _block(self, seqs: list[int], anchors: Tensor) -> Tensor:
        """The block rows [N, R, d] after `anchors` [N]. Always whole: fewer mask rows would change all of them."""
        rows = self.config.block_rows
        ids = torch.full((len(seqs), rows), self.config.mask_token_id, device=anchors.device)
        ids[:, 0] = anchors
        span = Span(self.store, seqs, [self.store.length(seq) for seq in seqs], rows)
        rope = self.model.rotary(span.positions, span.stop)
        return self.model.block(ids, rope, [self._attend(span, i) for i in range(self.config.num_layers)])

    def _attend(self, span: Span, layer: int) -> Attend:
        mask = span.mask(self.config.window(layer), causal=self.config.causal_sliding)
        return span.attend(f"k{layer}", f"v{layer}", self.model.layers[layer].self_attn.scale, mask)


class Eagle3Drafter(TorchDrafter):
    """Eagle3: one pass a drafted token.

    The newest feature waits for the token after it. With n tokens observed the store holds n rows of fused features and
    the keys and values of pairs 0..n-2; row n-1 of keys and values is written when its token is known.
    """

    def __init__(self, model: Eagle3, name: str, n_vocab: int | None = None) -> None:
        super().__init__(model, name, n_vocab)
        self.model = model
        row = (self.config.num_kv_heads, self.config.head_dim)
        self.store = self._new_store({"k": row, "v": row, "fused": (self.config.hidden_size,)})

    def _take(self, committed: Sequence[Committed]) -> None:
        for seq, tokens, features in committed:
            self._take_one(seq, tokens, features)

    def _take_one(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        start = self.store.length(seq)
        self.store.reserve(seq + 1, start + len(tokens))
        self.store.put("fused", seq, self.model.fuse(self._tensor(features, len(tokens))))
        self.store.advance(seq, len(tokens))
        first = max(start - 1, 0)  # the feature that waited, unless this is the sequence's beginning
        self._pair(seq, first, self._ids(tokens[first + 1 - start :]))

    def _pair(self, seq: int, first: int, ids: Tensor) -> None:
        """Write keys and values of pairs first, first+1, ... whose tokens are `ids` [L]."""
        if not len(ids):
            return
        fused = self.store.view("fused", [seq], first + len(ids))[:, first:]
        keys, values = self.model.keys_values(ids.unsqueeze(0), fused, self.model.rotary.span(first, len(ids)))
        self.store.put_at("k", self._ids([seq]), self._ids([*range(first, first + len(ids))]).unsqueeze(0), keys)
        self.store.put_at("v", self._ids([seq]), self._ids([*range(first, first + len(ids))]).unsqueeze(0), values)

    def _can_draft(self, seq: int) -> bool:
        return self.store.length(seq) > 0  # without a feature there is nothing to start from

    def _draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        length = min(max(request.block for request in requests), self.block_size)
        seqs = [request.seq for request in requests]
        last = [self.store.length(seq) - 1 for seq in seqs]
        self.store.reserve(max(seqs) + 1, max(last) + length)
        hidden = torch.stack([self.store.view("fused", [seq], n + 1)[0, n:] for seq, n in zip(seqs, last, strict=True)])
        previous, tokens = self._ids([request.anchor for request in requests]), []
        picker = Picker.wanted(requests, self.vocabulary)
        pick = picker or self.vocabulary.best
        for k in range(length):
            hidden = self._step(seqs, [n + k for n in last], previous, hidden)
            previous = pick(k, self.model.logits(hidden[:, 0]))
            tokens.append(previous)
        return self._drafts(requests, torch.stack(tokens, dim=1), None, picker)

    def _step(self, seqs: list[int], positions: list[int], ids: Tensor, hidden: Tensor) -> Tensor:
        """One pair a sequence: ids [N], hidden [N, 1, d] at `positions` -> [N, 1, d]."""
        span = Span(self.store, seqs, positions, 1)
        attend = span.attend("k", "v", self.model.layer.self_attn.scale, span.mask(None, causal=False))
        return self.model(ids.unsqueeze(1), hidden, self.model.rotary(span.positions, span.stop), attend)
