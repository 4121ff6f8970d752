"""The thin layer over libllama: exports that llama-cpp-python does not bind, batches made of numpy arrays, and its log.

Exports are C++-mangled, not stable API: the version is pinned, and `check_exports` names what is missing.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from dspark_cli.backends.base import DsparkError, FloatArray, IntArray
from dspark_cli.kernels import cpu_kernels

# Before libgomp loads. By default it spins for milliseconds at each of ggml's several hundred barriers a token, and beside
# another multi-threaded program the waiting threads take turns at it. `python -m dspark_cli.bench.neighbour` measures it:
# no difference on a quiet machine or beside one busy thread, 28 against 5 to 25 tok/s beside another session.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Before libllama loads: its CPU backend binds the products that are there.
cpu_kernels.preload()

import llama_cpp  # noqa: E402
from llama_cpp import llama_cpp as lib  # noqa: E402

cpu_kernels.start()

SUPPORTED_VERSION = "0.3.36"

_CTX = lib.llama_context_p_ctypes
_FLOATS = ctypes.POINTER(ctypes.c_float)

#: name -> (mangled name on Linux and macOS, argument types, result type)
_EXPORTS: dict[str, tuple[str, list[Any], Any]] = {
    "llama_set_embeddings_layer_inp": (
        "_Z30llama_set_embeddings_layer_inpP13llama_contextjb",
        [_CTX, ctypes.c_uint32, ctypes.c_bool],
        None,
    ),
    "llama_get_embeddings_layer_inp": (
        "_Z30llama_get_embeddings_layer_inpP13llama_contextj",
        [_CTX, ctypes.c_uint32],
        ctypes.c_void_p,  # float *: read by address
    ),
    "llama_set_embeddings_nextn": (
        "_Z26llama_set_embeddings_nextnP13llama_contextbb",
        [_CTX, ctypes.c_bool, ctypes.c_bool],
        None,
    ),
    "llama_get_embeddings_nextn": ("_Z26llama_get_embeddings_nextnP13llama_context", [_CTX], _FLOATS),
}


def _find(name: str) -> Any:
    mangled, argtypes, restype = _EXPORTS[name]
    for candidate in (name, mangled):
        function = getattr(lib._lib, candidate, None)
        if function is not None:
            function.argtypes, function.restype = argtypes, restype
            return function
    return None


def check_exports() -> list[str]:
    """Names of the exports that the installed libllama lacks ([] when everything is there)."""
    return [name for name in _EXPORTS if _find(name) is None]


@cache
def export(name: str) -> Callable[..., Any]:
    """The bound export. Raises DsparkError when this build of libllama does not have it."""
    function = _find(name)
    if function is None:
        raise DsparkError(
            f"libllama of llama-cpp-python {version('llama-cpp-python')} does not export {name}",
            hint=f"pip install --force-reinstall llama-cpp-python=={SUPPORTED_VERSION}",
        )
    return function  # type: ignore[no-any-return]


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends.

    Loading calls our log callback, and ctypes prints and drops an exception raised there: the interrupt would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


class NativeLog:
    """Keeps libllama's last warnings and errors, so that a failed load can say why, and prints nothing."""

    _PREFIX = re.compile(r"^[\w:~<>]+: ")

    def __init__(self, keep: int = 20) -> None:
        self.lines: deque[str] = deque(maxlen=keep)
        self._callback = lib.llama_log_callback(self._receive)  # libllama keeps the pointer: so must we
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", errors="replace").strip()
        if level in (2, 3) and line:
            self.lines.append(line)

    def clear(self) -> None:
        self.lines.clear()

    def reason(self) -> str:
        """The most telling of the last lines, without the function name in front; "" if nothing was said."""
        lines = [line for line in self.lines if "failed to load model" not in line] or list(self.lines)
        return self._PREFIX.sub("", lines[0]) if lines else ""


@cache
def start() -> NativeLog:
    """Initialise libllama once a process and take over its log."""
    lib.llama_backend_init()
    return NativeLog()


def devices() -> list[dict[str, Any]]:
    """What ggml can compute on: name, description, free and total bytes."""
    from llama_cpp import _ggml

    ggml = _ggml.libggml
    start()
    functions = {
        "ggml_backend_dev_count": ([], ctypes.c_size_t),
        "ggml_backend_dev_get": ([ctypes.c_size_t], ctypes.c_void_p),
        "ggml_backend_dev_name": ([ctypes.c_void_p], ctypes.c_char_p),
        "ggml_backend_dev_description": ([ctypes.c_void_p], ctypes.c_char_p),
        "ggml_backend_dev_memory": (
            [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)],
            None,
        ),
    }
    bound = {}
    for name, (argtypes, restype) in functions.items():
        function = bound[name] = getattr(ggml, name)
        function.argtypes, function.restype = argtypes, restype
    found = []
    for index in range(bound["ggml_backend_dev_count"]()):
        device = bound["ggml_backend_dev_get"](index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        bound["ggml_backend_dev_memory"](device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            {
                "name": bound["ggml_backend_dev_name"](device).decode(),
                "description": bound["ggml_backend_dev_description"](device).decode(),
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return found


class Batch:
    """A `llama_batch` over numpy arrays: filled by slices, freed by Python.

    `width` = 0 makes a token batch, otherwise an embedding batch of that width.
    """

    def __init__(self, capacity: int, width: int = 0) -> None:
        self.token = np.zeros(capacity, dtype=np.int32)
        self.pos = np.zeros(capacity, dtype=np.int32)
        self.seq = np.zeros(capacity, dtype=np.int32)
        self.logits = np.zeros(capacity, dtype=np.int8)
        self.embd = np.zeros((capacity if width else 0, width), dtype=np.float32)
        self._n_seq = np.ones(capacity, dtype=np.int32)
        # seq_id is int32_t **: entry i points at the one sequence id of token i.
        self._seq_pointers = (self.seq.ctypes.data + 4 * np.arange(capacity)).astype(np.uintp)
        self._struct = lib.llama_batch(
            n_tokens=0,
            token=None if width else self.token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=self.embd.ctypes.data_as(_FLOATS) if width else None,
            pos=self.pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._seq_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def capacity(self) -> int:
        return len(self.pos)

    def decode(self, ctx: Any, n_tokens: int) -> int:
        """Run the first `n_tokens` entries through `ctx`; returns llama_decode's status (0 = done)."""
        self._struct.n_tokens = n_tokens
        return int(lib.llama_decode(ctx, self._struct))


_views: dict[tuple[int, int, int], FloatArray] = {}


def rows_at(pointer: Any, n_rows: int, width: int) -> FloatArray:
    """A view [n_rows, width] of native floats; valid until the context decodes again.

    Views are kept by address: libllama answers from the same buffers pass after pass, and a round asks for half a dozen.
    """
    key = (ctypes.addressof(pointer.contents) if pointer else 0, n_rows, width)  # quicker than a cast
    view = _views.get(key)
    if view is None:
        if len(_views) >= 256:
            _views.clear()
        view = _views[key] = np.ctypeslib.as_array(pointer, shape=(n_rows, width))
    return view


def meta(model: Any, key: str) -> str | None:
    """A metadata value of a loaded GGUF as text; None if it is absent."""
    size = lib.llama_model_meta_val_str(model, key.encode(), None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    lib.llama_model_meta_val_str(model, key.encode(), buffer, size + 1)
    return buffer.value.decode("utf-8", errors="replace")


def token_text(vocab: Any, token: int) -> bytes:
    """The vocabulary's own entry of a token (not the rendered piece)."""
    return bytes(lib.llama_vocab_get_text(vocab, token) or b"")


def as_int32(tokens: Any) -> IntArray:
    return np.asarray(tokens, dtype=np.int32)  # type: ignore[return-value]


__all__ = ["Batch", "NativeLog", "check_exports", "export", "lib", "llama_cpp", "meta", "rows_at", "start"]
