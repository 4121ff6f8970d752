"""A libllama context: sequences, passes, rewinds. Target and drafters share it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dspark_cli.backends.base import BadInput, ContextFull, DsparkError, FloatArray
from dspark_cli.backends.llamacpp import native
from dspark_cli.backends.llamacpp.attention import FEW_SEQUENCES, few_sequences, flash_word, ubatch_rows
from dspark_cli.backends.llamacpp.model import Model, out_of_memory
from dspark_cli.backends.llamacpp.native import Batch, lib
from dspark_cli.backends.machine import usable_cores

KV_TYPES = {
    "f32": lib.GGML_TYPE_F32,
    "f16": lib.GGML_TYPE_F16,
    "q8_0": lib.GGML_TYPE_Q8_0,
    "q5_1": lib.GGML_TYPE_Q5_1,
    "q5_0": lib.GGML_TYPE_Q5_0,
    "q4_1": lib.GGML_TYPE_Q4_1,
    "q4_0": lib.GGML_TYPE_Q4_0,
}
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
DEFAULT_CTX = 4096


@dataclass(frozen=True)
class ContextOptions:
    """How contexts are made.

    ctx:        positions per sequence; None = what the model was trained on, at most 4096
    flash_attn: auto, off or on; see `attention.flash_word`
    ubatch:     rows computed at once; None = what suits the attention
    """

    ctx: int | None = None
    n_seq: int = 1
    threads: int | None = None
    gpu_layers: int = -1
    kv_type: str = "f16"
    flash_attn: str = "auto"
    ubatch: int | None = None

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise BadInput(f"unknown KV type {self.kv_type!r}: one of {', '.join(KV_TYPES)}")
        if self.flash_attn not in FLASH_ATTN:
            raise BadInput(f"flash attention is one of {', '.join(FLASH_ATTN)}, not {self.flash_attn!r}")
        for name, value in (("ctx", self.ctx), ("threads", self.threads), ("n_seq", self.n_seq)):
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, not {value}")

    @property
    def on_cpu(self) -> bool:
        return self.gpu_layers == 0 or not lib.llama_supports_gpu_offload()

    def flash(self, *, few: int) -> str:
        """`flash_attn` as a context of such a model gets it."""
        return flash_word(self.flash_attn, self.kv_type, self.on_cpu, self.n_seq, few=few)

    def drafting(self) -> ContextOptions:
        """The same for a drafter beside such a target: the last bits of a draft do not matter."""
        return replace(self, flash_attn=self.flash(few=FEW_SEQUENCES))


class Context:
    """One `llama_context` with its model, a token batch, and the number of tokens of each sequence.

    native_ms grows by the time spent inside llama_decode (synchronised), so that callers can tell passes from overhead.
    """

    def __init__(self, model: Model, options: ContextOptions, *, n_ctx: int, other: Any = None) -> None:
        self.model = model
        self.n_ctx = n_ctx
        self.n_seq = options.n_seq
        self.threads = options.threads or usable_cores()
        self.native_ms = 0.0
        params = lib.llama_context_default_params()
        # One cache for all sequences: forking a prefix is free, and a pass over several sequences is one ubatch.
        params.kv_unified = True
        params.n_ctx = n_ctx * options.n_seq
        self.flash = options.flash(few=few_sequences(model.format))
        ubatch = options.ubatch or ubatch_rows(self.flash)
        params.n_batch = max(ubatch, min(2048, params.n_ctx))
        params.n_ubatch = min(ubatch, params.n_batch)
        params.n_seq_max = options.n_seq
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        params.flash_attn_type = FLASH_ATTN[self.flash]
        params.swa_full = True  # rejected drafts are rewound: a sliding window that forgot its past could not be
        params.no_perf = True
        if other is not None:
            params.ctx_other = other
        log = native.start()
        log.clear()
        self.handle: Any = None
        try:
            with native.deferred_interrupts():
                self.handle = lib.llama_init_from_model(model.handle, params)
        except KeyboardInterrupt:
            self.close()
            raise
        if not self.handle:
            raise out_of_memory(f"a context of {params.n_ctx} tokens for {model.path.name}", log)
        self.memory = lib.llama_get_memory(self.handle)
        # As libllama made them: a small context caps both, and more tokens than that abort the process.
        self.max_rows = int(lib.llama_n_batch(self.handle))
        self.max_ubatch = int(lib.llama_n_ubatch(self.handle))
        self.batch = Batch(self.max_rows)

    def length(self, seq: int) -> int:
        return int(lib.llama_memory_seq_pos_max(self.memory, seq)) + 1

    def rewind(self, seq: int, length: int) -> None:
        if not lib.llama_memory_seq_rm(self.memory, seq, length, -1):
            raise DsparkError(
                f"{self.model.path.name} ({self.model.architecture}) cannot take back tokens: "
                "its state is recurrent, so drafts cannot be verified",
                hint="--drafter none",
            )

    def fork(self, source: int, destination: int, length: int | None) -> None:
        self.rewind(destination, 0)
        lib.llama_memory_seq_cp(self.memory, source, destination, 0, -1 if length is None else length)

    def decode(self, batch: Batch, n_tokens: int) -> None:
        """One pass. Raises ContextFull when the cache has no room, DsparkError when libllama fails."""
        start = time.perf_counter()
        status = batch.decode(self.handle, n_tokens)
        lib.llama_synchronize(self.handle)
        self.native_ms += (time.perf_counter() - start) * 1e3
        if status == 1:
            raise ContextFull(
                f"no room for {n_tokens} more tokens in a context of {self.n_ctx * self.n_seq}", hint="a larger --ctx"
            )
        if status != 0:
            raise DsparkError(
                f"libllama failed on a pass of {n_tokens} tokens (status {status}): {native.start().reason()}"
            )

    def logits(self, n_rows: int) -> Any:
        """float32 [n_rows, V] of the last pass, in batch order; a view until the next pass."""
        return native.rows_at(lib.llama_get_logits(self.handle), n_rows, self.model.n_vocab)

    def hidden(self, n_rows: int) -> Any:
        """float32 [n_rows, d]: final normed hidden states of the last pass, in batch order; a view until the next."""
        return native.rows_at(lib.llama_get_embeddings(self.handle), n_rows, self.model.n_embd)

    def layer_outputs(self, layers: Sequence[int], n_tokens: int) -> FloatArray:
        """float32 [n_tokens, m*d]: hidden states after each of the m decoder `layers`, side by side (libllama: the inputs of
        the layers that follow). They must have been asked for before the pass: libllama aborts the process otherwise."""
        read = native.export("llama_get_embeddings_layer_inp")
        gathered = np.empty((len(layers), n_tokens, self.model.n_embd), dtype=np.float32)
        to, size = gathered.ctypes.data, gathered.nbytes // len(layers)
        for layer in layers:
            # Copied by address: a numpy view of each would take longer than the rest, several times a round.
            ctypes.memmove(to, read(self.handle, layer + 1), size)
            to += size
        return gathered.transpose(1, 0, 2).reshape(n_tokens, -1)

    def close(self) -> None:
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None
