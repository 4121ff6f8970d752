"""Which revision of a Hub repository was pulled, and the hashes it was checked against.

One JSON file in the user's data directory. It pins: a later `pull` takes the same revision unless told to update, and
names resolve to the files of that revision.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dspark_cli.backends.errors import DsparkError


@dataclass(frozen=True)
class LockedFile:
    """size: bytes; sha256: of the content, as the Hub says and as was verified here."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Locked:
    """revision: the commit that was pulled; requested: the branch, tag or commit that was asked for."""

    revision: str
    requested: str = "main"
    pulled: str = ""
    files: dict[str, LockedFile] = field(default_factory=dict)


def lock_file() -> Path:
    from platformdirs import user_data_path

    return user_data_path("dspark") / "models.lock.json"


def read_lock() -> dict[str, Locked]:
    """Every entry by repository. Raises DsparkError for a file that is not ours to read."""
    path = lock_file()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Locked(**{**entry, "files": {n: LockedFile(**f) for n, f in entry.get("files", {}).items()}})
            for name, entry in raw.get("repositories", {}).items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DsparkError(f"{path} cannot be read: {error}", hint=f"delete {path}; nothing else is lost") from None


def locked(repository: str) -> Locked | None:
    return read_lock().get(repository)


def record(repository: str, entry: Locked) -> None:
    """Keep `entry`; files of the same revision that were pulled earlier stay listed."""
    with _changing() as entries:
        old = entries.get(repository)
        if old is not None and old.revision == entry.revision:
            entry = Locked(entry.revision, entry.requested, entry.pulled, {**old.files, **entry.files})
        entries[repository] = entry


def forget(repository: str, files: set[str] | None = None) -> None:
    """Drop files of the entry, or the whole entry when none is named or none is left."""
    with _changing() as entries:
        old = entries.pop(repository, None)
        left = {} if old is None or files is None else {n: f for n, f in old.files.items() if n not in files}
        if old is not None and left:
            entries[repository] = Locked(old.revision, old.requested, old.pulled, left)


@contextmanager
def _changing() -> Iterator[dict[str, Locked]]:
    """The entries, to be changed in place; written whole or not at all, one process at a time."""
    from filelock import FileLock

    path = lock_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            entries = read_lock()
            yield entries
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            text = json.dumps(
                {"version": 1, "repositories": {n: asdict(e) for n, e in sorted(entries.items())}}, indent=1
            )
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:
        raise DsparkError(f"{path} cannot be written: {error.strerror or error}") from None
