"""What the target thought of every document, computed once and kept on disk.

    FOLDER/tokens.i32     int32   [N]
    FOLDER/features.f16   float16 [N, m*d]   hidden states after the target layers, concatenated
    FOLDER/hidden.f16     float16 [N, d]     final normed hidden states (what the target's head reads)
    FOLDER/norms.f32      float32 [N]        log of the sum of exp(logits) over the whole vocabulary
    FOLDER/index.jsonl    a line per document: start, length, answer_start, held_out
    FOLDER/meta.json      what made it: target file, layers

Documents are appended; the index line comes last, so a killed run resumes after the last whole document.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dspark_cli.backends.base import DsparkError, FloatArray, Row
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.training.documents import Document, write_whole

LARGEST = 65504.0  # of float16: some models have a few activations beyond it
AT_ONCE = 16  # documents that torch reads in one pass


def bytes_per_token(layers: int, width: int) -> int:
    """Disk per token of a cache that reads `layers` layers of a target of hidden size `width`."""
    return 8 + 2 * width * (layers + 1)


@dataclass(frozen=True)
class Thoughts:
    """What the target makes of one document of S tokens.

    features: [S, m*d];  hidden: [S, d];  norms: [S]  (see the file's head)
    """

    features: FloatArray
    hidden: FloatArray
    norms: FloatArray


class Reader(Protocol):
    """Runs the target over documents."""

    def read(self, documents: Sequence[Document], layers: Sequence[int]) -> Iterator[Thoughts]:
        """One `Thoughts` a document, in order."""


class LlamaCppReader:
    """The very file that will be served, through llama.cpp."""

    def __init__(self, target: LlamaCppTarget) -> None:
        self.target = target

    def read(self, documents: Sequence[Document], layers: Sequence[int]) -> Iterator[Thoughts]:
        self.target.request_features(layers)
        self.target.request_hidden(True)
        try:
            for document in documents:
                yield self._thoughts(document)
        finally:
            self.target.request_hidden(False)
            self.target.request_features(())

    def _thoughts(self, document: Document) -> Thoughts:
        self.target.drop(0)
        parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        for begin in range(0, len(document.ids), 512):
            output = self.target.step([Row(0, document.ids[begin : begin + 512])])[0]
            assert output.features is not None
            assert output.hidden is not None
            peak = output.logits.max(axis=1)
            norms = peak + np.log(np.exp(output.logits - peak[:, None]).sum(axis=1))
            parts.append((output.features.copy(), output.hidden.copy(), norms))
        return Thoughts(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class TorchReader:
    """A torch copy of the file: other rounding, several documents a pass (`backends/torch/gguf_model.py`)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, documents: Sequence[Document], layers: Sequence[int]) -> Iterator[Thoughts]:
        for begin in range(0, len(documents), AT_ONCE):
            yield from self._read(documents[begin : begin + AT_ONCE], layers)

    def _read(self, documents: Sequence[Document], layers: Sequence[int]) -> Iterator[Thoughts]:
        import torch

        lengths = [len(d.ids) for d in documents]
        device = self.model.norm.weight.device
        ids = torch.zeros(len(documents), max(lengths), dtype=torch.int64)
        for i, document in enumerate(documents):
            ids[i, : lengths[i]] = torch.tensor(document.ids)
        with torch.inference_mode():
            *wanted, hidden = self.model.read(ids.to(device), torch.tensor(lengths, device=device), layers)
            for i, length in enumerate(lengths):
                norms = self.model.lm_head(hidden[i, :length]).float().logsumexp(dim=-1)
                features = torch.cat([x[i, :length] for x in wanted], dim=-1)
                yield Thoughts(*(x.float().cpu().numpy() for x in (features, hidden[i, :length], norms)))


@dataclass(frozen=True)
class Stretch:
    """Where a document lies in the arrays."""

    start: int
    length: int
    answer_start: int
    held_out: bool


class FeatureCache:
    """The cache folder, open for reading (memory-mapped) or for appending."""

    def __init__(self, folder: Path, *, target: str, layers: Sequence[int], width: int) -> None:
        self.folder, self.layers, self.width = folder, tuple(layers), width
        folder.mkdir(parents=True, exist_ok=True)
        meta: dict[str, Any] = {"target": target, "layers": list(layers), "width": width}
        path = folder / "meta.json"
        if path.exists() and (found := json.loads(path.read_text())) != meta:
            raise DsparkError(f"{folder} holds features of {found}, not of {meta}", hint="another --work folder")
        write_whole(path, json.dumps(meta))
        self._repair()

    @property
    def stretches(self) -> list[Stretch]:
        path = self.folder / "index.jsonl"
        return [Stretch(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def tokens(self) -> int:
        return max((s.start + s.length for s in self.stretches), default=0)

    def _widths(self) -> dict[str, tuple[type, int]]:
        return {
            "tokens.i32": (np.int32, 1),
            "features.f16": (np.float16, len(self.layers) * self.width),
            "hidden.f16": (np.float16, self.width),
            "norms.f32": (np.float32, 1),
        }

    def _repair(self) -> None:
        """Cut what a killed run left after the last whole document; after a power cut the index may be ahead of the data."""
        index = self.folder / "index.jsonl"
        if index.exists():
            text = index.read_text()
            lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            stored = min(self._stored(name) for name in self._widths())
            ends = (end["start"] + end["length"] for end in map(json.loads, lines))
            good = "".join(line for line, end in zip(lines, ends, strict=True) if end <= stored)
            if good != text:
                write_whole(index, good)
        end = self.tokens
        for name, (dtype, width) in self._widths().items():
            with (self.folder / name).open("ab") as file:
                file.truncate(end * width * np.dtype(dtype).itemsize)

    def _stored(self, name: str) -> int:
        """Tokens that an array really holds."""
        dtype, width = self._widths()[name]
        path = self.folder / name
        return path.stat().st_size // (width * np.dtype(dtype).itemsize) if path.exists() else 0

    def array(self, name: str) -> Any:
        """A memory map of one of the arrays, [N, width]; empty while nothing is stored."""
        dtype, width = self._widths()[name]
        path = self.folder / name
        if not path.stat().st_size:
            return np.empty((0, width), dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r").reshape(-1, width)

    def append(self, reader: Reader, documents: Sequence[Document], on_done: Callable[[int], None]) -> None:
        """Compute and store the documents that are not in the cache yet. `on_done` is told the tokens of each.

        Raises DsparkError when the disk cannot hold them; what is stored stays usable.
        """
        todo = documents[len(self.stretches) :]
        if not todo:
            return
        needed = sum(len(d.ids) for d in todo) * bytes_per_token(len(self.layers), self.width)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DsparkError(
                f"features need {needed / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB free",
                hint="fewer --tokens, or another --work folder",
            )
        position = self.tokens
        files = {name: (self.folder / name).open("ab") for name in self._widths()}
        try:
            with (self.folder / "index.jsonl").open("a") as index:
                for document, thoughts in zip(todo, reader.read(todo, self.layers), strict=True):
                    self._store(document, thoughts, files)
                    stretch = Stretch(position, len(document.ids), document.answer_start, document.held_out)
                    for file in files.values():
                        file.flush()
                    index.write(json.dumps(vars(stretch)) + "\n")
                    index.flush()
                    position += stretch.length
                    on_done(stretch.length)
        except OSError as error:
            raise DsparkError(
                f"{self.folder}: {error.strerror}; the first {position} tokens are kept",
                hint="make room and run it again",
            ) from None
        finally:
            for file in files.values():
                try:
                    file.close()
                except OSError:  # what a full disk did not take: cut off when the cache is opened again
                    continue

    def _store(self, document: Document, thoughts: Thoughts, files: dict[str, Any]) -> None:
        files["tokens.i32"].write(np.asarray(document.ids, dtype=np.int32).tobytes())
        files["features.f16"].write(thoughts.features.clip(-LARGEST, LARGEST).astype(np.float16).tobytes())
        files["hidden.f16"].write(thoughts.hidden.astype(np.float16).tobytes())
        files["norms.f32"].write(thoughts.norms.astype(np.float32).tobytes())
