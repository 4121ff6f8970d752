"""The results of a batch on disk: one JSON line each, whole or not at all, whatever ends the run.

A line is written in one call and flushed: a killed process loses none. A thread syncs the file to the disk meanwhile, so a
power loss costs at most what the last milliseconds brought. A torn last line is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from dspark_cli.backends.errors import BadInput, DsparkError


@dataclass(frozen=True)
class Entry:
    """Where a result stands in the journal, and what it is of. offset, size: bytes, the newline included."""

    offset: int
    size: int
    key: str
    file: str
    line: int
    failed: bool
    settings: str


class Journal:
    """An append-only file of results that one process at a time may have open. A context manager."""

    def __init__(self, path: Path) -> None:
        """Take the lock and open `path`, made if it is not there. Raises DsparkError when that cannot be."""
        self.path = path
        self._lock = _Lock(path)
        self._lock.acquire()
        try:
            self.repaired = self._cut_torn_line()
            self._file: BinaryIO = path.open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from None
        self._end = self._file.tell()
        self._sync = _Sync(self._file.fileno())

    def _cut_torn_line(self) -> int:
        """Bytes of an unfinished last line that were cut off."""
        if not self.path.exists():
            return 0
        with self.path.open("r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(0, end - 65536)
                file.seek(begin)
                at = file.read(end - begin).rfind(b"\n")
                if at >= 0:
                    end = begin + at + 1
                    break
                end = begin
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())
            return size - end

    def append(self, result: Mapping[str, Any]) -> tuple[int, int]:
        """Write one result; returns its (offset, size). Raises DsparkError when the disk refuses: nothing is left half."""
        data = json.dumps(result, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
        offset = self._end
        try:
            self._sync.check()
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(offset)
            raise self._unwritable(error) from None
        self._end += len(data)
        self._sync.wanted()
        return offset, len(data)

    def entries(self) -> tuple[list[Entry], int]:
        """(what is in the file, lines that are damaged). Raises BadInput for a file that is no journal."""
        found, damaged = [], 0
        with self.path.open("rb") as file:
            offset = 0
            for data in file:
                entry = _entry(data, offset)
                offset += len(data)
                if entry is not None:
                    found.append(entry)
                elif not found and not damaged and data.strip(b"\0\n\r ") and _is_foreign(data):
                    raise BadInput(f"{self.path} was not written by `dspark batch`", hint="another file for -o")
                else:
                    damaged += 1
        return found, damaged

    def rewrite(self, entries: Iterable[Entry], change: Callable[[Entry, dict[str, Any]], bool] | None = None) -> None:
        """Keep `entries` only, in that order, in one move. `change` may mend a result and then says so by True.

        Raises DsparkError when there is no room: the file is then as it was.
        """
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            with self.path.open("rb") as source, partial.open("wb") as out:
                for entry in entries:
                    data = read_entry(source, entry)
                    if change is not None:
                        result = json.loads(data)
                        if change(entry, result):
                            data = json.dumps(result, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
                    out.write(data)
                out.flush()
                os.fsync(out.fileno())
            self._stop()
            os.replace(partial, self.path)
            sync_folder(self.path.parent)
            self._file = self.path.open("ab", buffering=0)
            self._end = self._file.tell()
            self._sync = _Sync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            partial.unlink(missing_ok=True)

    def results(self, entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for entry in entries:
                yield json.loads(read_entry(file, entry))

    def _unwritable(self, error: OSError) -> DsparkError:
        return DsparkError(
            f"{self.path} cannot be written: {error.strerror or error}; the results that are in it are whole",
            hint="make room, then the same command with --resume",
        )

    def _stop(self) -> None:
        self._sync.close()
        self._file.close()

    def close(self) -> None:
        """Sync what is left. Raises DsparkError when the disk refuses."""
        try:
            self._stop()
            self._sync.check()
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(DsparkError):  # what already went wrong is what the user must read
            self.close()


def read_entry(file: BinaryIO, entry: Entry) -> bytes:
    file.seek(entry.offset)
    return file.read(entry.size)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last. Folders cannot be opened everywhere (Windows): there nothing is lost by trying."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _entry(data: bytes, offset: int) -> Entry | None:
    try:
        raw = json.loads(data)
        return Entry(
            offset, len(data), raw["key"], raw["file"], raw["line"], raw.get("error") is not None, raw["settings"]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_foreign(data: bytes) -> bool:
    """Whether a line is somebody else's rather than ours, damaged: it is whole in itself."""
    try:
        json.loads(data)
    except ValueError:
        return not data.startswith(b'{"id": ')
    return True


class _Sync:
    """Calls fsync in a thread whenever something was written since the last call.

    A SimpleQueue, as its `put` cannot be left half done by Ctrl-C: a Condition's lock could, and the end would wait for ever.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._written: SimpleQueue[bool] = SimpleQueue()  # False: this was the last
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="dspark-sync", daemon=True)
        self._thread.start()

    def wanted(self) -> None:
        self._written.put(True)

    def check(self) -> None:
        """Raises the OSError of an earlier sync."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the last sync."""
        self._written.put(False)
        self._thread.join()

    def _work(self) -> None:
        more = True
        while more:
            more = self._written.get()
            while more and not self._written.empty():  # one sync for all that was written meanwhile
                more = self._written.get()
            try:
                os.fsync(self._handle)
            except OSError as error:
                self._error = error


class _Lock:
    """A lock file beside the journal, gone when the run ends; a lock of a killed run is nobody's."""

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self.path = path.with_name(f".{path.name}.lock")
        self._of = path
        self._lock = FileLock(str(self.path))

    def acquire(self) -> None:
        from filelock import Timeout

        try:
            self.path.open("ab").close()  # a place that cannot be written looks like a lock that is taken
            self._lock.acquire(timeout=0)
        except Timeout:
            raise DsparkError(
                f"another `dspark batch` is writing {self._of}", hint="wait for it, or another file for -o"
            ) from None
        except OSError as error:
            raise DsparkError(f"{self._of} cannot be written: {error.strerror or error}") from None

    def release(self) -> None:
        if self._lock.is_locked:
            if os.name == "posix":  # whoever opened it meanwhile sees that it has no name any more, and makes a new one
                self.path.unlink(missing_ok=True)
            self._lock.release()
