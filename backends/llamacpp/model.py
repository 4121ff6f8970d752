"""A GGUF file loaded by libllama, its tokenizer and its chat template."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dspark_cli.backends.base import DsparkError, NotReady, Tokenizer
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.backends.llamacpp import native
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.llamacpp.native import lib
from dspark_cli.kernels import cpu_kernels

#: architecture of a DSpark or DFlash drafter's GGUF
DRAFTER_ARCHITECTURE = "dflash"
#: ggml.h: types of tensors; of those that kernels/cpu_kernels.c computes, ggml interleaves eight rows of these two on a CPU
GGML_Q4_0, GGML_Q4_K = 2, 12


class Model:
    """Weights and metadata. `close` frees them; contexts made from it must be gone by then.

    progress: hears the share loaded, 0 to 1; what it raises ends the loading and comes out of here
    """

    def __init__(
        self,
        path: str | Path,
        *,
        gpu_layers: int = -1,
        vocab_only: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.handle: Any = None
        check_file(self.path)
        log = native.start()
        log.clear()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = not _laid_out_for_ours(self.path)
        stopped: list[BaseException] = []
        if progress is not None:
            params.progress_callback = _told(progress, stopped)
        try:
            with native.deferred_interrupts():
                self.handle = lib.llama_model_load_from_file(str(self.path).encode(), params)
        except KeyboardInterrupt:
            self.close()
            raise
        if stopped:
            self.close()
            raise stopped[0]
        if not self.handle:
            silent = f"libllama gave no reason; is the file whole? It has {self.path.stat().st_size} bytes"
            raise DsparkError(f"{self.path} cannot be loaded: {log.reason() or silent}")
        self.vocab = lib.llama_model_get_vocab(self.handle)

    def meta(self, key: str) -> str | None:
        return native.meta(self.handle, key)

    @cached_property
    def architecture(self) -> str:
        return self.meta("general.architecture") or ""

    @cached_property
    def n_vocab(self) -> int:
        return int(lib.llama_vocab_n_tokens(self.vocab))

    @cached_property
    def n_embd(self) -> int:
        return int(lib.llama_model_n_embd(self.handle))

    @cached_property
    def n_layer(self) -> int:
        return int(lib.llama_model_n_layer(self.handle))

    @cached_property
    def n_ctx_train(self) -> int:
        return int(lib.llama_model_n_ctx_train(self.handle))

    @cached_property
    def format(self) -> str:
        """Quantization as people say it: "Q4_K_M", "F16"."""
        import gguf

        number = self.meta("general.file_type")
        try:
            return gguf.LlamaFileType(int(number or -1)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return "unknown"

    def close(self) -> None:
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None


def _laid_out_for_ours(path: Path) -> bool:
    """Whether weights stay on a CPU as they lie in the file, where ggml would interleave rows for products of its own:
    kernels/cpu_kernels.c computes them as they lie, several columns for little more than one.

    Not for a mixture of experts in Q4_0, whose products ggml computes; in Q4_K its own layout rounds passes of four tokens and
    more otherwise than passes of one.
    """
    if not cpu_kernels.complete():
        return False
    try:
        tensors = read_header(path).tensors
    except DsparkError:
        return False  # libllama says what is wrong with it
    kinds = {tensor.kind for tensor in tensors.values()}
    experts = any(tensor.kind == GGML_Q4_0 and "_exps." in name for name, tensor in tensors.items())
    return GGML_Q4_K in kinds or (GGML_Q4_0 in kinds and not experts)


def _told(progress: Callable[[float], None], stopped: list[BaseException]) -> Any:
    """`progress` as libllama calls it. ctypes would drop what it raises: kept in `stopped`, and loading is told to end."""

    def call(share: float, _: Any) -> bool:
        try:
            progress(share)
        except BaseException as reason:
            stopped.append(reason)
            return False
        return True

    return lib.llama_progress_callback(call)


class GgufTokenizer(Tokenizer):
    """The tokenizer that the GGUF carries, as libllama runs it."""

    def __init__(self, model: Model) -> None:
        self._vocab = model.vocab
        self.n_vocab = model.n_vocab
        bos = int(lib.llama_vocab_bos(self._vocab))
        self.bos_id = bos if bos >= 0 else None
        self._add_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))
        self.eog_ids = frozenset(i for i in range(self.n_vocab) if lib.llama_vocab_is_eog(self._vocab, i))
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        bos = bos and self._add_bos
        ids = np.empty(len(data) + 8, dtype=np.int32)
        while True:
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = lib.llama_tokenize(self._vocab, data, len(data), pointer, len(ids), bos, special)
            if count >= 0:
                return list(map(int, ids[:count]))
            ids = np.empty(-count, dtype=np.int32)

    def token_bytes(self, token: int) -> bytes:
        cached = self._bytes.get(token)
        if cached is None:
            cached = self._bytes[token] = self._piece(token)
        return cached

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


def tokens_agree(target: Model, drafter: Model, *, sample: int | None = None) -> tuple[bool, str]:
    """Whether two vocabularies have the same token for the same id; sizes may differ by padding at the end.

    Returns (agree, what differs). GGUF vocabularies of one family may be padded to different multiples (DESIGN 5).
    """
    size = min(target.n_vocab, drafter.n_vocab)
    if abs(target.n_vocab - drafter.n_vocab) > 128:  # llama.cpp's own limit for padding
        return False, f"vocabulary of {drafter.n_vocab} tokens, the target has {target.n_vocab}"
    for token in range(size):
        mine, theirs = native.token_text(drafter.vocab, token), native.token_text(target.vocab, token)
        if mine != theirs:
            return False, f"token {token} is {mine!r}, in the target {theirs!r}"
    return True, ""


class ChatTemplate:
    """The GGUF's own jinja2 template, run in a sandbox."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        source = lib.llama_model_chat_template(model.handle, None)
        self.source = source.decode("utf-8", errors="replace") if source else None
        self._name = model.path.name
        self._special = {
            name: native.token_text(model.vocab, token).decode("utf-8", errors="replace") if token >= 0 else ""
            for name, token in (
                ("bos_token", int(lib.llama_vocab_bos(model.vocab))),
                ("eos_token", int(lib.llama_vocab_eos(model.vocab))),
            )
        }
        self._adds_bos = bool(lib.llama_vocab_get_add_bos(model.vocab))

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self.source:
            raise DsparkError(f"{self._name} has no chat template", hint="dspark generate MODEL --raw PROMPT")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.source)

    def render(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        """Prompt text, without BOS where the tokenizer adds its own."""
        from jinja2 import TemplateError

        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text: str = self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._special, **options
            )
        except TemplateError as error:
            raise DsparkError(f"the chat template of {self._name} refuses the conversation: {error}") from None
        bos = self._special["bos_token"]
        return text.removeprefix(bos) if self._adds_bos and bos else text


def out_of_memory(what: str, log: native.NativeLog) -> NotReady:
    return NotReady(
        f"{what} could not be created: {log.reason() or 'out of memory'}", hint="a smaller --ctx, or --kv-type q8_0"
    )
