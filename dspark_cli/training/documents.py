"""Texts the target wrote itself, as token ids: the material a drafter learns from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dspark_cli.backends.base import DsparkError


@dataclass(frozen=True)
class Document:
    """One dialogue. `answer_start`: index of the first answer token; `temperature` of the answer (0 = greedy)."""

    ids: tuple[int, ...]
    answer_start: int
    temperature: float

    @property
    def held_out(self) -> bool:
        """Every 32nd document, by its content: a text never moves between training and evaluation."""
        prompt = " ".join(map(str, self.ids[: self.answer_start]))
        return hashlib.sha256(prompt.encode()).digest()[0] < 8


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all: a run may be killed at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a .jsonl file (`ids`, `answer_start`, `temperature`). A torn last line is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line)
                yield Document(tuple(item["ids"]), int(item["answer_start"]), float(item.get("temperature", 0.0)))
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    return
                raise DsparkError(f"{path}, line {number}: not a document ({error})") from None


def append_documents(path: Path, documents: Iterable[Document]) -> None:
    """Add whole lines to `path`, flushed."""
    with path.open("a", encoding="utf-8") as file:
        for document in documents:
            row = {"ids": document.ids, "answer_start": document.answer_start, "temperature": document.temperature}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
        file.flush()
