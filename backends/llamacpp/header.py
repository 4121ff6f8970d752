"""Metadata and tensor list of a GGUF file, and single tensors of it, without loading it.

gguf.GGUFReader takes seconds on the 100 000 strings of a vocabulary; this skips them. Every size is checked against the
file before it is used, so a damaged or hostile header is refused before anything is allocated for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_cli.backends.base import DsparkError, FloatArray

_STRING, _ARRAY = 8, 9
#: struct letters of scalar metadata values, by their type number
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
#: arrays up to this length are kept (layer lists, heads per layer); longer ones are vocabularies
_KEPT = 4096
_MOST_TENSORS, _MOST_VALUES = 1 << 20, 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """shape as numpy has it (rows first); kind: number of the ggml type; offset: bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the data. Raises DsparkError for a type that gguf does not know."""
        import gguf

        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]
        except (ValueError, KeyError):
            raise DsparkError(f"unknown tensor type {self.kind}") from None
        return prod(self.shape) // block * size


@dataclass(frozen=True)
class Header:
    """metadata: scalars, strings and short arrays by key; counts: length of every array, kept or not."""

    metadata: dict[str, Any]
    counts: dict[str, int]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of_model(self, key: str, default: Any = None) -> Any:
        """A value of the model's own architecture: `of_model("block_count")` is "llama.block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


class _Cursor:
    """Walks through a GGUF header."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 8  # magic and version

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def string(self) -> bytes:
        size = self.number("Q")
        if size > len(self._data) - self.at:
            raise ValueError(f"a string of {size} bytes in what is left of {len(self._data)}")
        self.at += size
        return bytes(self._data[self.at - size : self.at])

    def value(self, kind: int) -> tuple[Any, int | None]:
        """(value, None), or for arrays (list if short else None, length)."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind]), None
        if kind == _STRING:
            return self.string().decode("utf-8", errors="replace"), None
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > len(self._data) - self.at:
            raise ValueError(f"an array of {count} values in what is left of {len(self._data)} bytes")
        if count <= _KEPT:
            return [self.value(inner)[0] for _ in range(count)], count
        if inner == _STRING:
            self._skip_strings(count)
        else:
            self.at += struct.calcsize("<" + _SCALARS[inner]) * count
        return None, count

    def _skip_strings(self, count: int) -> None:
        data, at, size = self._data, self.at, struct.Struct("<Q")
        for _ in range(count):
            at += 8 + size.unpack_from(data, at)[0]
        self.at = at


def read_header(path: Path) -> Header:
    """Metadata and tensors of the file. Raises DsparkError for a header that is damaged or claims more than the file has."""
    try:
        return _read_cached(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise DsparkError(f"{path} cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=4)  # a pair check, the memory plan and the drafter itself all ask
def _read_cached(path: Path, changed_ns: int) -> Header:
    del changed_ns
    try:
        data = memoryview(np.memmap(path, dtype=np.uint8, mode="r").data)
        header = _read(_Cursor(data))
        _check_extent(header, len(data))
    except (
        struct.error,
        KeyError,
        UnicodeDecodeError,
        ValueError,
        OverflowError,
        RecursionError,
        DsparkError,
    ) as error:
        reason = f": {error}" if str(error) and not isinstance(error, struct.error) else ""
        raise DsparkError(f"{path} has a damaged GGUF header{reason}", hint="download it again") from None
    return header


def tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file by name. Raises DsparkError for a header that cannot be read to its end."""
    return read_header(path).tensors


def _read(cursor: _Cursor) -> Header:
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    if n_tensors > _MOST_TENSORS or n_values > _MOST_VALUES:
        raise ValueError(f"{n_tensors} tensors and {n_values} metadata values")
    metadata: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for _ in range(n_values):
        key = cursor.string().decode("utf-8")
        value, count = cursor.value(cursor.number("I"))
        if count is not None:
            counts[key] = count
        if value is not None:
            metadata[key] = value
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    found = []
    for _ in range(n_tensors):
        name = cursor.string().decode("utf-8")
        n_dims = cursor.number("I")
        if n_dims > 4:
            raise ValueError(f"tensor {name} with {n_dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
        found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    begin = -(-cursor.at // alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, begin + offset) for name, shape, kind, offset in found}
    return Header(metadata, counts, tensors)


def _check_extent(header: Header, n_bytes: int) -> None:
    for name, info in header.tensors.items():
        if info.offset + info.n_bytes > n_bytes:
            shape = "x".join(map(str, info.shape))
            raise ValueError(
                f"tensor {name} ({shape}) would end at byte {info.offset + info.n_bytes}, the file has {n_bytes}"
            )


def read_tensor(path: Path, info: TensorInfo) -> npt.NDArray[Any]:
    """One tensor as it is stored: integers as they are, everything else as float32."""
    import gguf

    kind = gguf.GGMLQuantizationType(info.kind)
    raw = np.fromfile(path, dtype=np.uint8, count=info.n_bytes, offset=info.offset)
    if kind == gguf.GGMLQuantizationType.I64:
        return raw.view(np.int64).reshape(info.shape)
    rows = raw.reshape(*info.shape[:-1], -1)
    values: FloatArray = np.asarray(gguf.quants.dequantize(rows, kind), dtype=np.float32)
    return values.reshape(info.shape)
