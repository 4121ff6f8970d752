"""`cpu_drafter.c` from Python: the pass of a DSpark or DFlash drafter on a CPU, in the library that `cpu_kernels` built.

Weights stay where they are (a file in memory): what is handed over must live as long as the drafter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_cli.kernels import cpu_kernels

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

#: rows of a block, and dimensions of a head, at most (cpu_drafter.c)
MOST_ROWS, MOST_HEAD = 32, 256
#: dimensions of a head are converted from halves by eight
HEAD_STEP = 8
F32 = 0
#: tokens of context, or rows of blocks, that are worked on at once
COLUMNS = 64
#: what a user may ask keys and values to be kept in: F16 serves both
KV_TYPES = ("f16", "f32")


class Matrix(ctypes.Structure):
    """type: ggml's number; data: address of `rows` rows of `width` weights."""

    _fields_ = (
        ("type", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("input_norm", "query_norm", "key_norm", "ffn_norm")


class Layer(ctypes.Structure):
    _fields_ = (*((name, Matrix) for name in MATRICES), *((name, ctypes.c_void_p) for name in NORMS))


class Description(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "d", "heads", "kv_heads", "head", "ffn", "rank")),
        *((name, ctypes.c_int64) for name in ("sequences", "cells", "columns", "threads", "causal")),
        *((name, ctypes.c_float) for name in ("epsilon", "rope_base", "confidence_bias")),
        *((name, Matrix) for name in ("embedding", "fusion", "vocabulary", "markov_embedding", "markov_output")),
        *((name, ctypes.c_void_p) for name in ("fused_norm", "output_norm", "confidence", "to_target")),
        ("layer", ctypes.POINTER(Layer)),
        ("layout", ctypes.c_void_p),
    )


class TypeLayout(ctypes.Structure):  # ggml.h: ggml_type_traits
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _ints(values: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.int32)


@dataclass(frozen=True)
class Drafted:
    """What a pass says of n rows.

    logits:     float32 [n, W], corrected by the Markov head along the best tokens; a view until the next pass
    best:       int64 [n]: where each row is greatest
    confidence: float32 [n]: probability of being accepted, given that those before are; None without such a head
    """

    logits: FloatArray
    best: IntArray
    confidence: FloatArray | None


class CpuDrafter:
    """One drafter with its cache. Raises MemoryError where there is none left for it."""

    def __init__(self, description: Description, keep: object) -> None:
        library = cpu_kernels.loaded()
        description.layout = ctypes.cast(_traits(), ctypes.c_void_p)
        library.dspark_drafter_new.restype = ctypes.c_void_p
        self._library, self._keep = library, (description, keep)
        self.columns = int(description.columns)
        self._width, self._n_features = int(description.vocabulary.rows), int(description.fusion.width)
        self._has_confidence = bool(description.confidence)
        self._logits = np.empty((self.columns, self._width), dtype=np.float32)
        self._best = np.empty(self.columns, dtype=np.int64)
        self._confidence = np.empty(self.columns, dtype=np.float32)
        self._handle = ctypes.c_void_p(library.dspark_drafter_new(ctypes.byref(description)))
        if not self._handle:
            raise MemoryError

    def take_in(self, sequences: npt.NDArray[Any], positions: npt.NDArray[Any], features: FloatArray) -> None:
        """Features float32 [n, m*d] of tokens at `positions` [n] of `sequences` [n] into the cache; any number.

        Raises ValueError for features of another shape.
        """
        if features.shape != (len(positions), self._n_features):
            raise ValueError(f"features of shape {features.shape}, not ({len(positions)}, {self._n_features})")
        sequences, positions = _ints(sequences), _ints(positions)
        features = np.ascontiguousarray(features, dtype=np.float32)
        for begin in range(0, len(positions), self.columns):
            chunk = slice(begin, begin + self.columns)
            self._library.dspark_drafter_take_in(
                self._handle,
                ctypes.c_int64(len(positions[chunk])),
                _address(sequences[chunk]),
                _address(positions[chunk]),
                _address(features[chunk]),
            )

    def draft(
        self, sequences: Sequence[int], lengths: Sequence[int], anchors: Sequence[int], rows: int, mask: int
    ) -> Drafted:
        """A block of `rows` rows [anchor, mask, ...] for each sequence, after its cached tokens; `columns` rows at most."""
        n = len(sequences) * rows
        parts = [_ints(values) for values in (sequences, lengths, anchors)]
        self._library.dspark_drafter_draft(
            self._handle,
            ctypes.c_int64(len(sequences)),
            ctypes.c_int64(rows),
            *map(_address, parts),
            ctypes.c_int32(mask),
            _address(self._logits),
            _address(self._best),
            _address(self._confidence),
        )
        return Drafted(self._logits[:n], self._best[:n], self._confidence[:n] if self._has_confidence else None)

    def fork(self, source: int, destination: int, length: int) -> None:
        self._library.dspark_drafter_fork(self._handle, *map(ctypes.c_int64, (source, destination, length)))

    def close(self) -> None:
        self._library.dspark_drafter_free(self._handle)
        self._handle = ctypes.c_void_p()


def unfit() -> str | None:
    """Why no drafter can run here: None if those can whose matrices `fits` says yes to."""
    if (problem := cpu_kernels.state().problem) is not None:
        return problem
    return None if hasattr(cpu_kernels.loaded(), "dspark_drafter_new") else "compiled without GCC's OpenMP"


def probable(kv_type: str) -> bool:
    """Whether a drafter will probably run here, even before libllama is loaded: for the memory plan."""
    started = cpu_kernels.state().problem != cpu_kernels.NOT_LOADED
    return kv_type in KV_TYPES and (unfit() is None if started else cpu_kernels.complete())


def fits(matrix: Matrix) -> bool:
    """Whether products with it are computed here."""
    if matrix.type not in cpu_kernels.TYPES:
        return False
    block = int(_layout(matrix).block)
    function = cpu_kernels.loaded().dspark_drafter_fits
    function.restype = ctypes.c_bool
    return matrix.width % block == 0 and bool(function(int(matrix.type), ctypes.c_int64(matrix.width // block)))


def readable(matrix: Matrix) -> bool:
    """Whether single rows of it can be turned into floats."""
    layout = _layout(matrix)
    return bool(layout.block > 0 and matrix.width % layout.block == 0 and (matrix.type == F32 or layout.to_float))


def _layout(matrix: Matrix) -> TypeLayout:
    traits = _traits()
    traits.restype, traits.argtypes = ctypes.POINTER(TypeLayout), [ctypes.c_int]
    layout: TypeLayout = traits(int(matrix.type)).contents
    return layout


@cache
def _traits() -> Any:
    return ctypes.CDLL(str(cpu_kernels.library())).ggml_get_type_traits
