"""Target features of every document, computed once by the very file that will be served, and kept on disk.

    FOLDER/tokens.i32     int32   [N]
    FOLDER/features.f16   float16 [N, m*d]   hidden states after the target layers, concatenated
    FOLDER/hidden.f16     float16 [N, d]     final normed hidden states (what the target's head reads)
    FOLDER/index.jsonl    a line per document: start, length, answer_start, held_out
    FOLDER/meta.json      what made it: target file, layers

Documents are appended; the index line comes last, so a killed run resumes after the last whole document.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_cli.backends.base import DsparkError, Row
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.training.documents import Document


def bytes_per_token(layers: int, width: int) -> int:
    """Disk per token of a cache that reads `layers` layers of a target of hidden size `width`."""
    return 4 + 2 * width * (layers + 1)


@dataclass(frozen=True)
class Span:
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
        path.write_text(json.dumps(meta))
        self._repair()

    @property
    def spans(self) -> list[Span]:
        path = self.folder / "index.jsonl"
        return [Span(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def _widths(self) -> dict[str, tuple[type, int]]:
        return {
            "tokens.i32": (np.int32, 1),
            "features.f16": (np.float16, len(self.layers) * self.width),
            "hidden.f16": (np.float16, self.width),
        }

    def _repair(self) -> None:
        """Cut what a killed run left after the last whole document."""
        index = self.folder / "index.jsonl"
        if index.exists() and (text := index.read_text()) and not text.endswith("\n"):
            index.write_text(text[: text.rfind("\n") + 1])
        end = max((s.start + s.length for s in self.spans), default=0)
        for name, (dtype, width) in self._widths().items():
            with (self.folder / name).open("ab") as file:
                file.truncate(end * width * np.dtype(dtype).itemsize)

    def array(self, name: str) -> Any:
        """A memory map of one of the three arrays, [N, width]."""
        dtype, width = self._widths()[name]
        return np.memmap(self.folder / name, dtype=dtype, mode="r").reshape(-1, width)

    def append(self, target: LlamaCppTarget, documents: Sequence[Document], on_done: Callable[[int], None]) -> None:
        """Compute and store documents that are not in the cache yet. `on_done` is told the tokens of each.

        Raises DsparkError when the disk cannot hold them; what is stored stays usable.
        """
        todo = documents[len(self.spans) :]
        tokens = sum(len(d.ids) for d in todo)
        needed, free = tokens * bytes_per_token(len(self.layers), self.width), shutil.disk_usage(self.folder).free
        if needed > free:
            raise DsparkError(f"features need {needed / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB free")
        target.request_features(self.layers)
        target.request_hidden(True)
        position = max((s.start + s.length for s in self.spans), default=0)
        files = {name: (self.folder / name).open("ab") for name in self._widths()}
        try:
            with (self.folder / "index.jsonl").open("a") as index:
                for document in todo:
                    self._store(target, document, files)
                    span = Span(position, len(document.ids), document.answer_start, document.held_out)
                    for file in files.values():
                        file.flush()
                    index.write(json.dumps(vars(span)) + "\n")
                    index.flush()
                    position += span.length
                    on_done(span.length)
        except OSError as error:
            raise DsparkError(f"{self.folder}: {error.strerror}; what was finished is kept") from None
        finally:
            for file in files.values():
                file.close()
            target.request_hidden(False)
            target.request_features(())

    def _store(self, target: LlamaCppTarget, document: Document, files: dict[str, Any]) -> None:
        target.drop(0)
        for begin in range(0, len(document.ids), 512):
            chunk = document.ids[begin : begin + 512]
            output = target.step([Row(0, chunk)])[0]
            assert output.features is not None
            assert output.hidden is not None
            files["tokens.i32"].write(np.asarray(chunk, dtype=np.int32).tobytes())
            files["features.f16"].write(output.features.astype(np.float16).tobytes())
            files["hidden.f16"].write(output.hidden.astype(np.float16).tobytes())
