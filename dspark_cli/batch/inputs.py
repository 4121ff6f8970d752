"""Files, folders and globs to items. Nothing is held but the record at hand; a bad record is an item with an `error`."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import BadInput
from dspark_cli.batch.items import Fields, Item, key_of

MAX_RECORD = 64 << 20  # bytes of one line or file
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".csv": "csv", ".tsv": "csv"}
WHOLE = (".txt", ".md")  # files of a folder that --whole-files takes
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class ReadOptions:
    """column: the CSV column that holds the prompt;  any_column: a template reads them, so none needs to be the prompt."""

    column: str | None = None
    whole_files: bool = False
    encoding: str = "utf-8"
    any_column: bool = False

    def __post_init__(self) -> None:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise BadInput(f"unknown encoding {self.encoding!r}", hint="--encoding latin-1") from None


def find_files(inputs: Sequence[str], options: ReadOptions, *, never: Sequence[Path] = ()) -> list[Path]:
    """The files that `inputs` (files, folders, globs) mean, each once, in order; without `never` (our own output).

    Raises BadInput for one that means nothing, or is of a kind nobody can read.
    """
    found: dict[Path, Path] = {}
    hidden = {path.resolve() for path in never}
    for given in inputs:
        for path in _expand(given, options):
            if path.resolve() not in hidden:
                found.setdefault(path.resolve(), path)
    if not found:
        raise BadInput(f"{', '.join(inputs)} is the output itself: there is no input", hint="another file for -o")
    return list(found.values())


def _expand(given: str, options: ReadOptions) -> list[Path]:
    path = Path(given).expanduser()
    suffixes: Sequence[str] = WHOLE if options.whole_files else tuple(KINDS)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in suffixes)
        if not files:
            raise BadInput(f"the folder {given} holds no {', '.join(suffixes)} file")
        return files
    if path.exists():
        if not options.whole_files and path.suffix.lower() not in KINDS:
            raise BadInput(
                f"{given} is not one of {', '.join(KINDS)}", hint="--whole-files, to make one prompt of each file"
            )
        return [path]
    if has_magic(given):
        matches = sorted(p for p in map(Path, glob(str(path), recursive=True)) if p.is_file())
        if matches:
            return [p for p in matches if options.whole_files or p.suffix.lower() in KINDS]
        raise BadInput(f"nothing matches {given}")
    raise BadInput(f"{given} does not exist")


def read_items(files: Sequence[Path], options: ReadOptions) -> Iterator[Item]:
    """All items in order. Raises BadInput for a file that cannot be read at all, or lacks the column asked for."""
    number = 0
    for file in files:
        reader = (
            _whole if options.whole_files else {"jsonl": _jsonl, "txt": _txt, "csv": _csv}[KINDS[file.suffix.lower()]]
        )
        try:
            for line, content, fields in reader(file, options):
                bad = isinstance(fields, str)
                yield Item(number, file, line, key_of(content), {} if bad else fields, fields if bad else None)  # type: ignore[arg-type]
                number += 1
        except OSError as error:
            raise BadInput(f"{file} cannot be read: {error.strerror or error}") from None


#: (line, content that identifies the record, its fields or what is wrong with it)
Record = tuple[int, bytes, Fields | str]


def _jsonl(file: Path, options: ReadOptions) -> Iterator[Record]:
    for line, content, text, problem in _lines(file, options):
        yield line, content, problem or _object(text)


def _object(text: str) -> Fields | str:
    try:
        found = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    except RecursionError:
        return "not JSON that can be read: nested too deeply"
    return found if isinstance(found, dict) else f"not a JSON object but {type(found).__name__}"


def _txt(file: Path, options: ReadOptions) -> Iterator[Record]:
    for line, content, text, problem in _lines(file, options):
        yield line, content, problem or {"prompt": text}


def _whole(file: Path, options: ReadOptions) -> Iterator[Record]:
    size = file.stat().st_size
    if size > MAX_RECORD:
        yield 1, f"{file.name} {size}".encode(), _too_long(size)
        return
    data = file.read_bytes()
    text, problem = _decoded(data, _encoding(data[:4], options))
    yield 1, file.name.encode() + b"\0" + data, problem or {"prompt": text, "name": file.name}


def _lines(file: Path, options: ReadOptions) -> Iterator[tuple[int, bytes, str, str]]:
    """(line, content, text, problem) of every line that is not blank."""
    with file.open("rb") as stream:
        encoding = _encoding(stream.read(4), options)
        stream.seek(0)
        if encoding not in ("utf-16", "utf-32"):
            yield from _byte_lines(stream, encoding)
            return
    with file.open(encoding=encoding, errors="replace") as wide:
        for line, text in enumerate(wide, start=1):
            if text.strip():
                yield line, text.rstrip("\r\n").encode("utf-8", "surrogatepass"), text.rstrip("\r\n"), ""


def _byte_lines(stream: Any, encoding: str) -> Iterator[tuple[int, bytes, str, str]]:
    line = 0
    while data := stream.readline(MAX_RECORD + 1):
        line += 1
        if len(data) > MAX_RECORD and not data.endswith(b"\n"):
            size, content = len(data), data[:4096]
            while (more := stream.readline(1 << 20)) and not more.endswith(b"\n"):
                size += len(more)
            yield line, content + str(size + len(more)).encode(), "", _too_long(size + len(more))
            continue
        if line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data.strip():
            data = data.rstrip(b"\r\n")
            yield line, data, *_decoded(data, encoding)


def _decoded(data: bytes, encoding: str) -> tuple[str, str]:
    """(text, what is wrong)."""
    try:
        return data.decode(encoding), ""
    except UnicodeDecodeError as error:
        name = encoding.upper().replace("-SIG", "")
        return "", f"not {name}: byte {data[error.start]:#04x} at position {error.start} (--encoding says otherwise)"


def _encoding(start: bytes, options: ReadOptions) -> str:
    return next((name for bom, name in BOMS if start.startswith(bom)), options.encoding)


def _too_long(size: int) -> str:
    return f"{size / 1e6:.0f} MB are more than a record may have ({MAX_RECORD >> 20} MB)"


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _csv(file: Path, options: ReadOptions) -> Iterator[Record]:
    with open_csv(file, options) as rows:
        header = rows.header
        column = _column(file, header, options)
        for line, row in rows:
            content = json.dumps(row).encode()
            if isinstance(row, str):
                yield line, content, row
            elif len(row) != len(header):
                yield line, content, f"{len(row)} fields, the header has {len(header)}"
            elif any("\udc80" <= c <= "\udcff" for value in row for c in value):
                yield line, content, f"not {rows.encoding.upper()} (--encoding says otherwise)"
            else:
                fields = dict(zip(header, row, strict=True))
                yield line, content, fields if column is None else {**fields, "prompt": fields[column]}


class open_csv:  # noqa: N801  (a context manager that reads like open)
    """Rows of a CSV file: `header`, then (line, fields, or what is wrong). Comma, semicolon or tab, as the header has it."""

    def __init__(self, file: Path, options: ReadOptions) -> None:
        with file.open("rb") as stream:
            self.encoding = _encoding(stream.read(4), options)
        self._stream = file.open(encoding=self.encoding, errors="surrogateescape", newline="")
        csv.field_size_limit(MAX_RECORD)
        first = self._stream.readline(1 << 20)
        self._stream.seek(0)
        self.delimiter = max(",;\t", key=first.count)
        self._rows = csv.reader(self._stream, delimiter=self.delimiter)
        try:
            self.header = [name.strip() for name in next(self._rows, [])]
        except csv.Error as error:
            raise BadInput(f"{file} is not a CSV file: {error}") from None
        if not self.header:
            raise BadInput(f"{file} is empty: a CSV file begins with the names of its columns")

    def __enter__(self) -> open_csv:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[tuple[int, list[str] | str]]:
        while True:
            line = self._rows.line_num + 1
            try:
                row = next(self._rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, f"not CSV: {error}; the rest of the file is not read"
                return
            if row:
                yield line, row


def _column(file: Path, header: list[str], options: ReadOptions) -> str | None:
    """The column that holds the prompt; None where a template reads them all."""
    names = ", ".join(header)
    if options.column is not None:
        if options.column not in header:
            raise BadInput(f"{file} has no column {options.column!r}, but {names}")
        return options.column
    if options.any_column:
        return None
    if "prompt" in header:
        return "prompt"
    if len(header) == 1:
        return header[0]
    raise BadInput(f"{file} has the columns {names}: which one is the prompt?", hint=f"--column {header[0]}")
