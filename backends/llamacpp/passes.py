"""Who computes the passes of a `dflash` drafter: libllama, or on a CPU kernels/cpu_drafter.c where it can.

Both take in the target's features as keys and values of the drafter's layers, and run the block [anchor, mask, ...], which
leaves nothing behind. Both read the same file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_cli.backends.base import ContextFull, DraftRequest, FloatArray, IntArray
from dspark_cli.backends.llamacpp import native
from dspark_cli.backends.llamacpp.context import Context, ContextOptions
from dspark_cli.backends.llamacpp.export import DrafterSpec, gguf_shapes
from dspark_cli.backends.llamacpp.header import Header, read_header, read_tensor
from dspark_cli.backends.llamacpp.model import Model, out_of_memory
from dspark_cli.backends.llamacpp.native import Batch, lib
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.pairing import DrafterFacts
from dspark_cli.kernels import cpu_drafter
from dspark_cli.kernels.cpu_drafter import CpuDrafter, Description, Layer, Matrix

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class DraftRows:
    """What a pass says of n rows; views until the next pass.

    logits:     float32 [n, W], corrected along the greedy chain
    ids:        int64 [W]: the target's ids of those columns; None: they are the ids
    greedy:     int64 [n]: the likeliest token of each row, as the target's id
    confidence: float32 [n]; None without a confidence head
    """

    logits: FloatArray
    ids: IntArray | None
    greedy: IntArray
    confidence: FloatArray | None

    def __getitem__(self, rows: slice) -> DraftRows:
        confidence = None if self.confidence is None else self.confidence[rows].copy()
        return DraftRows(self.logits[rows], self.ids, self.greedy[rows].copy(), confidence)


class DraftPass(ABC):
    """most_rows: of a pass, over all its blocks."""

    most_rows: int

    @abstractmethod
    def block(self, requests: Sequence[DraftRequest], rows: int, mask: int) -> DraftRows:
        """One pass over a block of `rows` rows for each request, after what its sequence has taken in."""

    @abstractmethod
    def take_in(self, seqs: Ints, positions: Ints, features: FloatArray) -> None:
        """Features float32 [n, m*d] of tokens at `positions` [n] of `seqs` [n]."""

    @abstractmethod
    def length(self, seq: int) -> int:
        """Tokens taken in."""

    @abstractmethod
    def rewind(self, seq: int, length: int) -> None:
        """Forget everything of `seq` from position `length` on."""

    @abstractmethod
    def fork(self, source: int, destination: int, length: int | None) -> None:
        """Make `destination` share the first `length` tokens of `source`."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Calling it twice is harmless."""


class LibllamaPass(DraftPass):
    """libllama's own graph, in a context that borrows embedding and output head from the target's.

    The confidence head's answer is element 0 of a row of the "nextn" output, already a sigmoid. Of a reduced vocabulary
    the logits are those of the whole one, -inf where it has none.
    """

    def __init__(
        self, model: Model, target: LlamaCppTarget, facts: DrafterFacts, options: ContextOptions, d2t: IntArray | None
    ) -> None:
        n_ctx = target.info.n_ctx + facts.rows
        self.context = Context(model, options.drafting(), n_ctx=n_ctx, other=target.context.handle)
        native.export("llama_set_embeddings_nextn")(self.context.handle, True, True)
        lib.llama_set_causal_attn(self.context.handle, model.meta("dflash.attention.causal") == "true")
        self.most_rows = self.context.max_ubatch  # a block may not be split between ubatches
        self._inject = Batch(self.context.max_ubatch, width=len(facts.layers) * target.info.n_embd)
        self._n_embd, self._n_vocab = model.n_embd, target.info.n_vocab
        self._has_confidence, self._d2t = facts.confidence, d2t

    def block(self, requests: Sequence[DraftRequest], rows: int, mask: int) -> DraftRows:
        batch, starts = self.context.batch, []
        for i, request in enumerate(requests):
            of_request = slice(i * rows, (i + 1) * rows)
            start = self.context.length(request.seq)
            starts.append(start)
            batch.token[of_request] = mask
            batch.token[of_request.start] = request.anchor
            batch.pos[of_request] = np.arange(start, start + rows)
            batch.seq[of_request] = request.seq
            batch.logits[of_request] = 1
        n = rows * len(requests)
        self.context.decode(batch, n)
        for request, start in zip(requests, starts, strict=True):
            self.context.rewind(request.seq, start)
        logits = to_width(self.context.logits(n), self._n_vocab)
        greedy = logits.argmax(axis=1)
        if self._d2t is not None and any(request.choose for request in requests):
            return DraftRows(logits[:, self._d2t], self._d2t, greedy, self._confidence(n))
        return DraftRows(logits, None, greedy, self._confidence(n))

    def _confidence(self, n_rows: int) -> FloatArray | None:
        if not self._has_confidence:
            return None
        pointer = native.export("llama_get_embeddings_nextn")(self.context.handle)
        rows: FloatArray = native.rows_at(pointer, n_rows, self._n_embd)
        return rows[:, 0]

    def take_in(self, seqs: Ints, positions: Ints, features: FloatArray) -> None:
        batch = self._inject
        for begin in range(0, len(positions), batch.capacity):
            chunk = slice(begin, min(begin + batch.capacity, len(positions)))
            size = chunk.stop - begin
            batch.embd[:size] = features[chunk]
            batch.pos[:size] = positions[chunk]
            batch.seq[:size] = seqs[chunk]
            self.context.decode(batch, size)

    def length(self, seq: int) -> int:
        return self.context.length(seq)

    def rewind(self, seq: int, length: int) -> None:
        self.context.rewind(seq, length)

    def fork(self, source: int, destination: int, length: int | None) -> None:
        self.context.fork(source, destination, length)

    def close(self) -> None:
        self.context.close()


def to_width(logits: FloatArray, n_vocab: int) -> FloatArray:
    """Logits [n, any] cut or filled with -inf to [n, n_vocab]: vocabularies of one family may be padded differently."""
    if logits.shape[1] >= n_vocab:
        return logits[:, :n_vocab]
    return np.pad(logits, ((0, 0), (0, n_vocab - logits.shape[1])), constant_values=-np.inf)


class KernelPass(DraftPass):
    """Our own kernels on a CPU: the same weights, read from the files themselves; keys and values are kept in F16."""

    def __init__(self, description: Description, keep: object, n_ctx: int, n_vocab: int, d2t: IntArray | None) -> None:
        self._drafter = CpuDrafter(description, keep)
        self.most_rows = self._drafter.columns
        self._lengths = [0] * int(description.sequences)
        self._n_ctx, self._n_vocab, self._d2t = n_ctx, n_vocab, d2t

    def block(self, requests: Sequence[DraftRequest], rows: int, mask: int) -> DraftRows:
        seqs = [request.seq for request in requests]
        lengths = [self._lengths[seq] for seq in seqs]
        drafted = self._drafter.draft(seqs, lengths, [request.anchor for request in requests], rows, mask)
        if self._d2t is None:
            return DraftRows(to_width(drafted.logits, self._n_vocab), None, drafted.best, drafted.confidence)
        return DraftRows(drafted.logits, self._d2t, self._d2t[drafted.best], drafted.confidence)

    def take_in(self, seqs: Ints, positions: Ints, features: FloatArray) -> None:
        if len(positions) and positions.max() >= self._n_ctx:
            raise ContextFull(
                f"no room for token {int(positions.max()) + 1} in a drafter's context of {self._n_ctx}",
                hint="a larger --ctx",
            )
        self._drafter.take_in(seqs, positions, features)
        for seq, position in zip(seqs.tolist(), positions.tolist(), strict=True):
            self._lengths[seq] = position + 1

    def length(self, seq: int) -> int:
        return self._lengths[seq]

    def rewind(self, seq: int, length: int) -> None:
        self._lengths[seq] = min(self._lengths[seq], length)

    def fork(self, source: int, destination: int, length: int | None) -> None:
        shared = self._lengths[source] if length is None else min(length, self._lengths[source])
        self._drafter.fork(source, destination, shared)
        self._lengths[destination] = shared

    def close(self) -> None:
        self._drafter.close()


def by_kernels(
    path: Path, target: LlamaCppTarget, facts: DrafterFacts, options: ContextOptions, d2t: IntArray | None
) -> Callable[[], KernelPass] | None:
    """Makes the passes of the drafter in `path` by our own kernels; None where they cannot run it, and libllama does."""
    if not options.on_cpu or options.kv_type not in cpu_drafter.KV_TYPES or cpu_drafter.unfit() is not None:
        return None
    drafter, theirs, n_vocab = _File(path), _File(target.model.path), target.info.n_vocab
    spec = _spec(drafter.header, facts)
    if spec is None or not _plain_target(theirs.header):
        return None
    description = _describe(drafter, theirs, spec, n_vocab)
    if description is None:
        return None
    n_ctx = target.info.n_ctx + facts.rows
    description.sequences, description.cells = target.info.n_seq, n_ctx
    description.columns = cpu_drafter.COLUMNS
    description.threads = options.threads or target.context.threads
    if d2t is not None:
        if len(d2t) != description.vocabulary.rows or not 0 <= d2t.min() <= d2t.max() < n_vocab:
            return None
        description.to_target = drafter.keep(np.ascontiguousarray(d2t, dtype=np.int64))

    def make() -> KernelPass:
        try:
            with native.deferred_interrupts():
                return KernelPass(description, (drafter, theirs), n_ctx, n_vocab, d2t)
        except MemoryError:
            raise out_of_memory(f"the context of {path.name}", native.start()) from None

    return make


_OF_LAYER = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "input_norm": "attn_norm",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
}
#: what scales or caps an embedding or logits, of drafter or target
_SCALED = ("embedding_scale", "logit_scale", "final_logit_softcapping", "attn_logit_softcapping")
_NUMBERS = (
    "attention.key_length",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "block_count",
)


def _spec(header: Header, facts: DrafterFacts) -> DrafterSpec | None:
    """The shape of a drafter of which cpu_drafter.c knows all; None if there is more to it."""
    value, tensors = header.of_model, header.tensors
    if not all(isinstance(value(key, 0), int) for key in _NUMBERS):  # a list is a number a layer
        return None
    heads, head = int(value("attention.head_count", 0)), int(value("attention.key_length", 0))
    spec = DrafterSpec(
        block_size=facts.block_size,
        target_layers=facts.layers,
        n_layer=int(value("block_count", 0)),
        n_head=heads,
        n_head_kv=int(value("attention.head_count_kv", 0)) or heads,
        head_dim=head,
        hidden=facts.n_embd,
        ffn=int(value("feed_forward_length", 0)),
        mask_token_id=facts.mask or 0,
        rms_eps=float(value("attention.layer_norm_rms_epsilon", 1e-6)),
        rope_theta=float(value("rope.freq_base", 10000.0)),
        sample_from_anchor=facts.rows == facts.block_size,
        markov_rank=tensors["markov_w1.weight"].shape[-1] if facts.markov else 0,
        confidence=facts.confidence,
        draft_vocab=tensors["d2t"].shape[0] if facts.reduced else None,
    )
    plain = (
        not any(map(value, _SCALED))
        and value("hidden_activation") in (None, "silu")
        and not any(key.startswith("dflash.rope.scaling") for key in header.metadata)
        and not any(value(f"attention.{key}") for key in ("sliding_window", "scale", "value_scale", "clamp_kqv"))
        and 0 < head <= cpu_drafter.MOST_HEAD
        and head % cpu_drafter.HEAD_STEP == 0
        and head == int(value("attention.value_length") or head) == int(value("rope.dimension_count") or head)
        and spec.n_head_kv > 0
        and heads % spec.n_head_kv == 0
        and facts.rows <= cpu_drafter.MOST_ROWS
        and not (facts.markov and not spec.sample_from_anchor)
    )
    shapes = gguf_shapes(spec, facts.n_vocab)
    if not facts.borrows and not facts.reduced:
        shapes["output.weight"] = (facts.n_vocab, facts.n_embd)
    return spec if plain and {name: info.shape for name, info in tensors.items()} == shapes else None


def _plain_target(header: Header) -> bool:
    """Whether embedding and output head are all in this file, and to be used as they are: some families scale either, or cap
    the logits."""
    if int(header.metadata.get("split.count", 1)) > 1:
        return False
    return not header.architecture.startswith(("gemma", "minicpm")) and not any(map(header.of_model, _SCALED))


class _File:
    """A GGUF file in memory, as matrices and vectors."""

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._kept: list[npt.NDArray[Any]] = []

    def matrix(self, name: str) -> Matrix:
        info = self.header.tensors[name]
        return Matrix(info.kind, info.shape[0], info.shape[-1], self._data.ctypes.data + info.offset)

    def values(self, name: str) -> FloatArray:
        return np.ascontiguousarray(read_tensor(self.path, self.header.tensors[name]), dtype=np.float32)

    def vector(self, name: str) -> int:
        """Address of its float32 values."""
        return self.keep(self.values(name))

    def keep(self, array: npt.NDArray[Any]) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)


def _describe(drafter: _File, target: _File, spec: DrafterSpec, n_vocab: int) -> Description | None:
    """The drafter as cpu_drafter.c reads it; None where the target's tables do not fit, or products are not ours."""
    if "token_embd.weight" not in target.header.tensors:
        return None
    places = [(drafter, "output.weight"), (target, "output.weight"), (target, "token_embd.weight")]
    file, name = next((file, name) for file, name in places if name in file.header.tensors)
    layers = (Layer * spec.n_layer)()
    for at, layer in enumerate(layers):
        for part, theirs in _OF_LAYER.items():
            take = drafter.matrix if part in cpu_drafter.MATRICES else drafter.vector
            setattr(layer, part, take(f"blk.{at}.{theirs}.weight"))
    made = Description(
        layers=spec.n_layer,
        d=spec.hidden,
        heads=spec.n_head,
        kv_heads=spec.n_head_kv,
        head=spec.head_dim,
        ffn=spec.ffn,
        rank=spec.markov_rank,
        causal=bool(drafter.header.of_model("attention.causal", False)),
        epsilon=spec.rms_eps,
        rope_base=spec.rope_theta,
        embedding=target.matrix("token_embd.weight"),
        fusion=drafter.matrix("fc.weight"),
        vocabulary=file.matrix(name),
        fused_norm=drafter.vector("enc.output_norm.weight"),
        output_norm=drafter.vector("output_norm.weight"),
        layer=layers,
    )
    # A head may have rows that only pad its vocabulary.
    made.vocabulary.rows = min(made.vocabulary.rows, n_vocab)
    used = [made.fusion, made.vocabulary, *(getattr(layer, part) for layer in layers for part in cpu_drafter.MATRICES)]
    of_tokens = [made.embedding]
    if spec.markov_rank:
        made.markov_embedding = drafter.matrix("markov_w1.weight")
        made.markov_output = drafter.matrix("markov_w2.weight")
        made.markov_output.rows = min(made.markov_output.rows, n_vocab)
        used.append(made.markov_output)
        of_tokens.append(made.markov_embedding)
    if spec.confidence:
        made.confidence = drafter.vector("conf_proj.weight")
        made.confidence_bias = float(drafter.values("conf_proj.bias")[0])
    sound = (
        made.vocabulary.width == made.embedding.width == spec.hidden
        and spec.mask_token_id < n_vocab
        and all(table.rows >= n_vocab and cpu_drafter.readable(table) for table in of_tokens)
        and (not spec.markov_rank or made.markov_output.rows == made.vocabulary.rows)
        and all(map(cpu_drafter.fits, used))
    )
    return made if sound else None
