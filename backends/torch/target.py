"""A full-precision target: a checkpoint that transformers implements, with a static cache of our own.

Sequences of different lengths and rows of different widths share one pass: every column knows its position, where its keys
go and what it may see (cache.py). Nothing from the checkpoint's folder is ever executed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.base import (
    BadInput,
    ContextFull,
    DsparkError,
    NotReady,
    PairMismatch,
    Row,
    RowOutput,
    Target,
    TargetInfo,
)
from dspark_cli.backends.machine import usable_cores
from dspark_cli.backends.torch.cache import KeyValues, Place
from dspark_cli.backends.torch.capture import Recorder, keys_bucket, recorder_for, width_bucket
from dspark_cli.backends.torch.checkpoint import TargetTables
from dspark_cli.backends.torch.config import BadCheckpoint
from dspark_cli.backends.torch.devices import (
    Facts,
    capture_for,
    detect,
    dtype_for,
    is_out_of_memory,
    kernels_for,
    pick,
)
from dspark_cli.backends.torch.folder import check_folder
from dspark_cli.backends.torch.loading import end_tokens, failures, load_model, plain_attention, unfit
from dspark_cli.backends.torch.network import Network
from dspark_cli.backends.torch.rows import columns_of, n_logits, padded, split
from dspark_cli.backends.torch.tokenizer import open_tokenizer, render_chat
from dspark_cli.kernels import dispatch

DEFAULT_CTX = 4096
#: tokens of one pass at most
MAX_ROWS = 2048
FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
#: how far cached passes may be from transformers' own uncached pass at load, relative to the size of the logits
AGREE = {"float32": 0.01, "bfloat16": 0.15, "float16": 0.05}

Render = Callable[[Sequence[dict[str, str]], bool | None], str]


@dataclass(frozen=True)
class TorchOptions:
    """How a target is opened.

    ctx:     positions a sequence (None = what the model was trained on, at most 4096)
    device:  auto, or a kind of device with or without its number: cuda, cuda:1, rocm, metal, cpu
    dtype:   None = as stored, where the device computes in it at speed
    capture: auto, off, graph or compile (capture.py); DSPARK_CAPTURE is the default
    kernels: reference or triton (kernels/dispatch.py); DSPARK_KERNELS is the default
    notice:  is told, in one line, what the user may want to know
    """

    ctx: int | None = None
    n_seq: int = 1
    device: str = "auto"
    threads: int | None = None
    dtype: str | None = None
    capture: str = field(default_factory=lambda: os.environ.get("DSPARK_CAPTURE", "auto"))
    kernels: str = field(default_factory=lambda: os.environ.get("DSPARK_KERNELS", "reference"))
    notice: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        for name, value in (("ctx", self.ctx), ("threads", self.threads), ("n_seq", self.n_seq)):
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, not {value}")


def open_target(folder: str | Path, options: TorchOptions | None = None, *, name: str | None = None) -> TorchTarget:
    """The checkpoint in `folder`, ready to answer.

    Raises DsparkError for a folder that cannot or must not be loaded, NotReady (exit code 3) where this machine cannot
    serve it: no such device, a model unknown to transformers, out of memory.
    """
    options = options or TorchOptions()
    found = check_folder(Path(folder))
    facts = pick(options.device, detect())
    capture_for(options.capture, facts)  # a switch that is none is told before minutes of loading
    dispatch.use(kernels_for(options.kernels, facts, dispatch.installed))
    dtype = options.dtype or dtype_for(found.dtype, facts, found.model_type)
    with failures(f"{found.path.name} in {dtype}", found.n_bytes(dtype), facts):
        model = load_model(found.path, getattr(torch, dtype), torch.device(facts.torch_name))
    network = Network(model, found.path.name)
    tokenizer = open_tokenizer(found.path, len(network.head), end_tokens(model))
    return TorchTarget(
        network,
        tokenizer,
        lambda messages, thinking: render_chat(tokenizer, messages, thinking, found.path.name),
        facts,
        options,
        name=name or found.path.name,
        path=str(found.path),
    )


class TorchTarget(Target):
    """One transformers model with a static cache of `options.n_seq` sequences."""

    def __init__(
        self,
        network: Network,
        tokenizer: Any,
        render: Render,
        facts: Facts,
        options: TorchOptions,
        *,
        name: str,
        path: str,
    ) -> None:
        """`tokenizer`: a `Tokenizer`; `render`: (messages, thinking) -> prompt text."""
        self.network, self.tokenizer, self._render = network, tokenizer, render
        self.device = torch.device(facts.torch_name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton starts its kernels on the current one
        self.max_rows = MAX_ROWS
        self._notice = options.notice
        trained = int(getattr(network.text, "max_position_embeddings", None) or DEFAULT_CTX)
        self._n_ctx = options.ctx or min(trained, DEFAULT_CTX)
        if self._n_ctx > trained:
            raise BadInput(f"--ctx {self._n_ctx} is more than the {trained} tokens {name} was trained on")
        threads = options.threads or usable_cores()
        torch.set_num_threads(threads)
        how = capture_for(options.capture, facts)
        dtype = str(network.embedding.dtype).removeprefix("torch.")
        self.info = TargetInfo(
            name=name,
            path=path,
            backend="torch",
            format=FORMATS.get(dtype, dtype),
            device=facts.torch_name,
            n_vocab=len(network.head),
            n_embd=int(network.text.hidden_size),
            n_layer=network.n_layer,
            n_ctx=self._n_ctx,
            n_seq=options.n_seq,
            details={"threads": threads, "kv_type": dtype, "capture": how, "chip": facts.name},
        )
        with unfit(name), failures(f"a first pass of {name}", network.n_bytes, facts):
            self.cache = self._make_cache(options.n_seq, facts)
        self._recorder = (
            None if how == "off" else Recorder(network, self.cache, options.n_seq, recorder_for(how, self.device))
        )
        with unfit(name), failures(f"a first pass of {name}", network.n_bytes + self.cache.store.size_bytes, facts):
            self._check_cache()

    @torch.inference_mode()
    def _make_cache(self, n_seq: int, facts: Facts) -> KeyValues:
        """The whole cache at once, so that memory which is missing is missed now and not in the middle of an answer."""
        shapes = self.network.probe(self._check_ids()[:, :4])
        if not shapes:
            raise DsparkError(f"{self.info.name} caches no keys and values: it cannot take back tokens")
        like = self.network.embedding
        values = sum(heads * (key + value) for heads, key, value in shapes.values())
        needed = self.network.n_bytes + values * n_seq * (self._n_ctx + 1) * like.element_size()
        with failures(f"{self.info.name} with {n_seq} x {self._n_ctx} tokens of context", needed, facts):
            return KeyValues(shapes, n_seq, self._n_ctx, like)

    def _check_ids(self) -> Tensor:
        """Some ordinary ids [1, 12]."""
        ids = np.random.default_rng(0).integers(0, min(self.info.n_vocab, 1000), size=(1, min(12, self._n_ctx)))
        return torch.from_numpy(ids).to(self.device)

    def _check_cache(self) -> None:
        """Refuse a model whose passes with our cache, masks and attention are not those of transformers without them."""
        ids = self._check_ids()
        with plain_attention(self.network.model):
            wanted = self.network.without_cache(ids)[0].float()
        tokens = ids[0].tolist()
        parts = [self.step([Row(0, part)])[0].logits for part in (tokens[:5], tokens[5:6], tokens[6:]) if part]
        self.drop(0)
        found = torch.from_numpy(np.concatenate(parts)).to(wanted.device)
        apart = float((found - wanted).norm() / wanted.norm())
        limit = AGREE.get(str(self.network.embedding.dtype).removeprefix("torch."), 0.01)
        if not apart <= limit:  # NaN is not either
            raise BadCheckpoint(
                f"{self.info.name}: logits through the cache differ from transformers' own by {apart:.2g} of their size "
                f"(at most {limit}): its weights are broken, or the torch backend does not fit this kind of model",
                hint="a GGUF of it",
            )

    @property
    def tables(self) -> TargetTables:
        """Embedding and output head, for drafters that borrow them."""
        embedding, head = self.network.embedding, self.network.head
        return TargetTables(embedding, None if head.data_ptr() == embedding.data_ptr() else head)

    def render_chat(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        return self._render(messages, thinking)

    def request_features(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not -1 <= layer < self.info.n_layer:
                raise PairMismatch(
                    f"the drafter reads the output of layer {layer}; {self.info.name} has usable layers "
                    f"-1 to {self.info.n_layer - 1}"
                )
        self._take(tuple(layers), self.network.hidden)

    def request_hidden(self, wanted: bool) -> None:
        """Whether `step` also returns the final hidden states (training needs them, decoding does not)."""
        self._take(self.network.layers, wanted)

    def _take(self, layers: tuple[int, ...], hidden: bool) -> None:
        if (layers, hidden) != (self.network.layers, self.network.hidden):
            self.network.take(layers, hidden)
            if self._recorder is not None:
                self._recorder.clear()

    # -- passes --------------------------------------------------------------------------------------------------------

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        for row in rows:
            if self.length(row.seq) + len(row.tokens) > self._n_ctx:
                raise ContextFull(
                    f"no room for {len(row.tokens)} more tokens in a context of {self._n_ctx}", hint="a larger --ctx"
                )
        if sum(len(row.tokens) for row in rows) > self.max_rows:
            return self._in_parts(rows)
        try:
            return self._pass(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return self._after_out_of_memory(rows)

    def _after_out_of_memory(self, rows: Sequence[Row]) -> list[RowOutput]:
        """The same rows in smaller passes, from now on: the schedule drafts no more than fits in one (`max_rows`)."""
        tokens = sum(len(row.tokens) for row in rows)
        self._release()
        if tokens <= 1:
            raise NotReady(
                f"out of memory on {self.info.device}: not even one token of {self.info.name} can be computed",
                hint="a smaller --ctx, or close what else uses the device",
            )
        self.max_rows = max(1, tokens // 2)
        self._notice(f"out of memory in a pass of {tokens} tokens: passes of at most {self.max_rows} from now on")
        return self._in_parts(rows)

    def _release(self) -> None:
        """Give back what allocators and recordings hold."""
        if self._recorder is not None:
            self._recorder.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def _in_parts(self, rows: Sequence[Row]) -> list[RowOutput]:
        """Passes of at most `max_rows` tokens: rows one by one, long rows piece by piece."""
        return [self._row_in_parts(row) for row in rows]

    def _row_in_parts(self, row: Row) -> RowOutput:
        wanted = n_logits(row)
        parts, done = [], 0
        while done < len(row.tokens):
            piece = list(row.tokens[done : done + self.max_rows])  # which may shrink from one piece to the next
            done += len(piece)
            kept = max(0, min(len(piece), wanted - (len(row.tokens) - done)))
            parts += self.step([Row(row.seq, piece, kept)])
        join = [part.features for part in parts if part.features is not None]
        states = [part.hidden for part in parts if part.hidden is not None]
        return RowOutput(
            np.concatenate([part.logits for part in parts]),
            np.concatenate(join) if join else None,
            np.concatenate(states) if states else None,
        )

    @torch.inference_mode()
    def _pass(self, rows: Sequence[Row]) -> list[RowOutput]:
        began = time.perf_counter()
        recorded = self._recorded(rows) if self._recorder is not None else None
        outputs = self._eager(rows) if recorded is None else recorded
        for row in rows:
            self.cache.store.advance(row.seq, len(row.tokens))
        self.native_ms += (time.perf_counter() - began) * 1e3  # arrays are on the host, so the device has finished
        return outputs

    def _eager(self, rows: Sequence[Row]) -> list[RowOutput]:
        width = max(len(row.tokens) for row in rows)
        keys = max(self.length(row.seq) + len(row.tokens) for row in rows)
        starts = [self.length(row.seq) for row in rows]
        ids, positions, write_at = padded([row.tokens for row in rows], starts, width, self.cache.spare).to(self.device)
        columns = columns_of(rows)
        keep = None if len(columns) == width else torch.tensor(columns or [0], device=self.device)
        place = Place([row.seq for row in rows], positions, write_at, keys)
        output = self.network(ids, self.cache, place, keep)
        return split(rows, range(len(rows)), columns or [0], output)

    def _recorded(self, rows: Sequence[Row]) -> list[RowOutput] | None:
        """The pass through a recording of its shape; None if it is too wide to be recorded."""
        assert self._recorder is not None
        width = width_bucket(max(len(row.tokens) for row in rows))
        if width is None:
            return None
        keys = keys_bucket(max(self.length(row.seq) + len(row.tokens) for row in rows), self._n_ctx)
        tokens: list[Sequence[int]] = [[] for _ in range(self.info.n_seq)]
        for row in rows:
            tokens[row.seq] = row.tokens
        starts = [self.length(seq) for seq in range(self.info.n_seq)]
        table = padded(tokens, starts, width, self.cache.spare).to(self.device)
        try:
            output = self._recorder(table[0], table[1], table[2], keys)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._record_no_more(error)
            return None
        return split(rows, [row.seq for row in rows], range(width), output)

    def _record_no_more(self, error: RuntimeError) -> None:
        """Some models do what cannot be recorded; their passes stay eager. Nothing was committed: the pass runs again."""
        self._recorder = None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._notice(f"passes of {self.info.name} cannot be recorded ({reason[:120]}): they run eagerly, more slowly")

    def length(self, seq: int) -> int:
        return self.cache.store.length(seq)

    def rewind(self, seq: int, length: int) -> None:
        self.cache.store.rewind(seq, length)

    @torch.inference_mode()
    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.cache.store.fork(source, destination, length)

    def close(self) -> None:
        if not hasattr(self, "network"):
            return
        self._release()
        self.cache.store.clear()
        del self.network
        self._recorder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
