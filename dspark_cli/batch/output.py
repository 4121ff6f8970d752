"""What the user gets: a JSONL file, a CSV file with an added column, or a folder with one file per input.

All of them are made from a journal. Of a JSONL output the journal is the output itself, put in input order at the end.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.batch.inputs import KINDS, ReadOptions, open_csv
from dspark_cli.batch.journal import Entry, Journal, sync_folder

ANSWER, ERROR = "answer", "answer_error"  # columns that a CSV output adds


@dataclass(frozen=True)
class Output:
    """Where results go.

    kind:      jsonl, csv or folder;  path: the file or folder;  journal: where results are kept as they come
    unordered: leave the lines of a JSONL output in the order in which they were finished
    """

    kind: str
    path: Path
    journal: Path
    unordered: bool = False

    @classmethod
    def of(cls, output: Path | None, folder: Path | None, *, unordered: bool) -> Output:
        """Raises BadInput for none, both, or a kind of file that is not written."""
        if (output is None) == (folder is None):
            raise BadInput("say where results go: -o FILE.jsonl, -o FILE.csv or --output-dir FOLDER")
        if folder is not None:
            return cls("folder", folder, folder / "_results.jsonl", unordered)
        assert output is not None
        suffix = output.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            return cls("jsonl", output, output, unordered)
        if suffix == ".csv":
            return cls("csv", output, output.with_name(f"{output.name}.results.jsonl"))
        raise BadInput(f"{output} is neither .jsonl nor .csv", hint=f"-o {output.stem or 'out'}.jsonl")

    def check(self, files: Sequence[Path], options: ReadOptions, *, resume: bool) -> None:
        """Refuse, before anything is loaded, what could not be written at the end. Raises BadInput or DsparkError."""
        if self.kind == "folder":
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DsparkError(f"{self.path} cannot be made: {error.strerror}") from None
        elif not self.path.parent.is_dir():
            raise DsparkError(f"the folder {self.path.parent} of -o does not exist")
        if self.path.is_dir() != (self.kind == "folder"):
            raise BadInput(f"{self.path} is {'a folder' if self.path.is_dir() else 'a file'}")
        there = next((p for p in (self.journal, self.path) if p.is_file()), None)
        if not resume and there is not None and there.stat().st_size:
            raise BadInput(f"{there} is there already", hint="--resume, to do what is missing in it, or another file")
        if self.kind == "csv":
            self._check_csv(files, options)
        if self.kind == "folder" and any(p.resolve() == q.resolve() for p, q in self.names(files, options).items()):
            raise BadInput(f"{self.path} holds the inputs: results would overwrite them", hint="--output-dir answers")

    def _check_csv(self, files: Sequence[Path], options: ReadOptions) -> None:
        wrong = next((f for f in files if KINDS.get(f.suffix.lower()) != "csv"), None)
        if wrong is not None or options.whole_files:
            raise BadInput(f"-o {self.path} adds a column to CSV inputs, and {wrong} is none", hint="-o out.jsonl")
        first: list[str] | None = None
        for file in files:
            with open_csv(file, options) as rows:
                if first is not None and rows.header != first:
                    raise BadInput(f"{file} has other columns than {files[0]}", hint="-o out.jsonl")
                first = rows.header
        if first and {ANSWER, ERROR} & set(first):
            raise BadInput(f"{files[0]} has a column {ANSWER!r} or {ERROR!r} already", hint="-o out.jsonl")

    # -- at the end ----------------------------------------------------------------------------------------------------

    def finish(self, journal: Journal, order: dict[int, Entry], files: Sequence[Path], options: ReadOptions) -> None:
        """Make the output from a complete journal. `order`: item number -> its result."""
        if not self.unordered:
            entries = [order[number] for number in sorted(order)]
            if any(a.offset > b.offset for a, b in pairwise(entries)):
                journal.rewrite(entries)
        if self.kind == "csv":
            self._write_csv(journal, files, options)

    def file_done(
        self, journal: Journal, file: Path, entries: Sequence[Entry], target: Path, options: ReadOptions
    ) -> None:
        """All items of an input file are done: write its own file, in one move."""
        target.parent.mkdir(parents=True, exist_ok=True)
        results = journal.results(entries)
        if options.whole_files:
            texts = [r["text"] for r in results if "text" in r]
            if texts:
                with replacing(target) as out:
                    out.write(texts[0])
            return
        with replacing(target) as out:
            for result in results:
                out.write(json.dumps(result, ensure_ascii=False) + "\n")

    def names(self, files: Sequence[Path], options: ReadOptions) -> dict[Path, Path]:
        """Input file -> its file in the folder: the same name, .jsonl added where it holds many results."""
        whole = [f.resolve() for f in files]
        parent = Path(os.path.commonpath([f.parent for f in whole])) if whole else Path()
        found = {}
        for file, path in zip(files, whole, strict=True):
            name = path.relative_to(parent)
            lines = not options.whole_files and name.suffix.lower() != ".jsonl"
            found[file] = self.path / (name.with_name(f"{name.name}.jsonl") if lines else name)
        return found

    def _write_csv(self, journal: Journal, files: Sequence[Path], options: ReadOptions) -> None:
        entries, _ = journal.entries()
        results = journal.results(entries)  # in input order by now
        with replacing(self.path) as out:
            writer: Any = None
            for file in files:
                with open_csv(file, options) as rows:
                    if writer is None:
                        writer = csv.writer(out, delimiter=rows.delimiter)
                        writer.writerow([*rows.header, ANSWER, ERROR])
                    for _, row in rows:
                        result = next(results)
                        cells = row if isinstance(row, list) else []
                        cells = [*cells, *[""] * (len(rows.header) - len(cells))][: len(rows.header)]
                        writer.writerow([*map(_clean, cells), result.get("text", ""), result.get("error", "")])


def _clean(cell: str) -> str:
    """Bytes that were no text in the input become U+FFFD."""
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when all of it is on the disk. Raises DsparkError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", newline="") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise DsparkError(
            f"{path} cannot be written: {error.strerror or error}; no result is lost",
            hint="make room, then the same command with --resume",
        ) from None
    finally:
        partial.unlink(missing_ok=True)
