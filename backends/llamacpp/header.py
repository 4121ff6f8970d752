"""The tensor list of a GGUF file, and single tensors of it.

gguf.GGUFReader takes seconds on the 100 000 strings of a vocabulary; this skips them, as only tensors are wanted here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_cli.backends.base import DsparkError, FloatArray

_STRING, _ARRAY, _UINT32 = 8, 9, 4
#: bytes of a scalar metadata value, by its type number
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class TensorInfo:
    """shape as numpy has it (rows first); kind: number of the ggml type; offset: bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Walks through a GGUF header."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 8  # magic and version

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize("<" + form)
        return int(value)

    def string(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return bytes(self._data[self.at - size : self.at])

    def skip(self, kind: int) -> None:
        if kind in _SCALARS:
            self.at += _SCALARS[kind]
        elif kind == _STRING:
            self._skip_strings(1)
        else:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                self._skip_strings(count)
            elif inner == _ARRAY:
                for _ in range(count):
                    self.skip(_ARRAY)
            else:
                self.at += _SCALARS[inner] * count

    def _skip_strings(self, count: int) -> None:
        data, at, size = self._data, self.at, struct.Struct("<Q")
        for _ in range(count):
            at += 8 + size.unpack_from(data, at)[0]
        self.at = at


def tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file by name. Raises DsparkError for a header that cannot be read to its end."""
    try:
        cursor = _Cursor(memoryview(np.memmap(path, dtype=np.uint8, mode="r").data))
        return _read(cursor)
    except (struct.error, KeyError, UnicodeDecodeError, ValueError):
        raise DsparkError(f"{path} has a damaged GGUF header") from None


def _read(cursor: _Cursor) -> dict[str, TensorInfo]:
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    alignment = 32
    for _ in range(n_values):
        key, kind = cursor.string(), cursor.number("I")
        if key == b"general.alignment" and kind == _UINT32:
            alignment = cursor.number("I")
        else:
            cursor.skip(kind)
    found = []
    for _ in range(n_tensors):
        name = cursor.string().decode("utf-8")
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
        found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    begin = -(-cursor.at // alignment) * alignment
    return {name: TensorInfo(shape, kind, begin + offset) for name, shape, kind, offset in found}


def read_tensor(path: Path, info: TensorInfo) -> npt.NDArray[Any]:
    """One tensor as it is stored: integers as they are, everything else as float32."""
    import gguf

    kind = gguf.GGMLQuantizationType(info.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n_bytes = prod(info.shape) // block * size
    raw = np.fromfile(path, dtype=np.uint8, count=n_bytes, offset=info.offset)
    if kind == gguf.GGMLQuantizationType.I64:
        return raw.view(np.int64).reshape(info.shape)
    rows = raw.reshape(*info.shape[:-1], -1)
    values: FloatArray = np.asarray(gguf.quants.dequantize(rows, kind), dtype=np.float32)
    return values.reshape(info.shape)
