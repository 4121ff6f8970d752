"""Files from the Hub into the Hub's own cache: resumed, checked against the Hub's hashes, one process at a time.

huggingface-hub starts an interrupted file anew (it writes to a name of its own each time), so the bytes are fetched here:
to `<blob>.dspark.incomplete` beside the finished blob and under that library's lock. The snapshot link is left to it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from dspark_cli.backends.errors import DsparkError, NotReady
from dspark_cli.registry import hub
from dspark_cli.registry.disk import hub_cache
from dspark_cli.registry.hub import Listing, RemoteFile
from dspark_cli.registry.lock import Locked, LockedFile, record
from dspark_cli.registry.plan import size

CHUNK = 1 << 18
#: left free on the disk: logs, the lock file, other programs
SPARE_BYTES = 64 << 20


class Report(Protocol):
    """Who wants to know how far it is."""

    def expect(self, files: int, total: int, have: int) -> None:
        """Before the first file: how many there are, their bytes, and how many of these are here already."""

    def begin(self, name: str, total: int, have: int) -> None:
        """A file of `total` bytes, `have` of them here already."""

    def advance(self, name: str, n_bytes: int) -> None:
        """Bytes arrived; negative when some had to be thrown away."""

    def end(self, name: str) -> None: ...

    def say(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """A report that nobody reads."""

    def expect(self, files: int, total: int, have: int) -> None: ...

    def begin(self, name: str, total: int, have: int) -> None: ...

    def advance(self, name: str, n_bytes: int) -> None: ...

    def end(self, name: str) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Pulled:
    """paths: of the files asked for, in that order; downloaded: bytes that came over the network."""

    repository: str
    revision: str
    paths: list[Path]
    total: int
    downloaded: int


@dataclass
class _Store:
    """Where one repository lies in the Hub's cache."""

    listing: Listing
    root: Path = field(init=False)
    locks: Path = field(init=False)

    def __post_init__(self) -> None:
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=self.listing.repository, repo_type="model")
        self.root, self.locks = hub_cache() / folder, hub_cache() / ".locks" / folder

    def blob(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / file.blob

    def partial(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / f"{file.blob}.dspark.incomplete"

    def pointer(self, file: RemoteFile) -> Path:
        return self.root / "snapshots" / self.listing.revision / file.name

    def have(self, file: RemoteFile) -> int:
        """Bytes of `file` that are here, whole or in part."""
        for path in (self.pointer(file), self.blob(file), self.partial(file)):
            if path.is_file():
                return min(path.stat().st_size, file.size)
        return 0


Job = tuple[Listing, Sequence[RemoteFile]]


def check_space(jobs: Sequence[Job], report: Report | None = None) -> None:
    """Refuse before the first byte what cannot fit (NotReady with the numbers); tell `report` what is ahead."""
    sizes = [(file.size, _Store(listing).have(file)) for listing, files in jobs for file in files]
    total, have = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    folder = next(path for path in (hub_cache(), *hub_cache().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if total > have and total - have + SPARE_BYTES > free:
        names = " and ".join(listing.repository for listing, _ in jobs)
        raise NotReady(
            f"{names} need{'s' if len(jobs) == 1 else ''} {size(total - have)} more on disk, {folder} has {size(free)} free"
            f" ({size(SPARE_BYTES)} stay so)",
            hint="`dspark rm` shows what can go; HF_HUB_CACHE=/other/disk puts the cache elsewhere",
        )
    if report is not None:
        report.expect(len(sizes), total, have)


def pull_files(
    listing: Listing, wanted: Sequence[RemoteFile], report: Report | None = None, *, verify: bool = True
) -> Pulled:
    """Bring `wanted` here and record them in the lock file. `check_space` comes first.

    verify: also hash files that are here already; one that is damaged is fetched again.
    Raises NotReady for a disk that fills up or a Hub out of reach, DsparkError for files that stay wrong.
    """
    report = report or Silent()
    store = _Store(listing)
    total = sum(file.size for file in wanted)
    downloaded, paths = 0, []
    for file in wanted:
        had = store.have(file)
        report.begin(file.name, file.size, had)
        try:
            paths.append(_bring(store, file, report, verify))
        except OSError as error:
            raise _disk_error(error, store, file) from None
        downloaded += max(0, file.size - had)
        report.end(file.name)
    _point_ref(store)
    hashes = {
        file.name: LockedFile(file.size, file.sha256 or _sha256(path)) for file, path in zip(wanted, paths, strict=True)
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record(listing.repository, Locked(listing.revision, listing.requested, now, hashes))
    return Pulled(listing.repository, listing.revision, paths, total, downloaded)


def _bring(store: _Store, file: RemoteFile, report: Report, verify: bool) -> Path:
    pointer = store.pointer(file)
    if pointer.is_file() and pointer.stat().st_size == file.size:
        if not verify or _is_right(pointer, file):
            return pointer
        report.say(f"{file.name} on disk is damaged: fetching it again")
        report.advance(file.name, -file.size)
        _remove(pointer, store.blob(file))
    if hub.offline():
        raise hub.switched_off(f"{store.listing.repository}: {file.name}")
    from huggingface_hub.utils import WeakFileLock

    blob = store.blob(file)
    store.locks.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(store.locks / f"{file.blob}.lock"):
        if not (blob.is_file() and blob.stat().st_size == file.size and _is_right(blob, file)):
            _remove(blob)
            _fetch_checked(store, file, report)
            os.replace(store.partial(file), blob)
    return _link(store, file)


def _fetch_checked(store: _Store, file: RemoteFile, report: Report) -> None:
    """The partial file made whole and right; a file with a wrong hash is fetched once more from its beginning."""
    partial = store.partial(file)
    for again in (False, True):
        _fetch(store, file, report)
        if _is_right(partial, file):
            return
        partial.unlink()
        report.advance(file.name, -file.size)
        if not again:
            report.say(f"{file.name} arrived damaged: fetching it again")
    raise DsparkError(
        f"{store.listing.repository}: {file.name} arrived twice with another hash than the Hub states ({file.blob[:12]}...)",
        hint="something between this machine and the Hub changes files (a proxy?); nothing was kept",
    )


def _fetch(store: _Store, file: RemoteFile, report: Report) -> None:
    """Append to the partial file until it has `file.size` bytes."""
    from huggingface_hub import hf_hub_url

    listing, partial = store.listing, store.partial(file)
    url = hf_hub_url(listing.repository, file.name, revision=listing.revision, endpoint=hub.endpoint())
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    with partial.open("ab", buffering=0) as sink:
        hub.patiently(
            lambda: _stream(url, sink, file, report),
            what=f"{listing.repository}: {file.name}",
            progress=lambda: sink.seek(0, os.SEEK_END),
        )


def _stream(url: str, sink: Any, file: RemoteFile, report: Report) -> None:
    """One request for what is missing. Raises when the connection ends early: the caller comes again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    start = sink.seek(0, os.SEEK_END)
    if start >= file.size:
        return
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server does not resume
            sink.truncate(0)
            report.advance(file.name, -start)
            start = 0
        for chunk in response.iter_bytes(CHUNK):
            _write(sink, chunk)
            report.advance(file.name, len(chunk))
            start += len(chunk)
            if start > file.size:
                break
    if start > file.size:
        sink.truncate(0)
        report.advance(file.name, -start)
        raise DsparkError(f"{file.name}: the server sends more than the {file.size} bytes that the Hub states")
    if start < file.size:
        raise ConnectionError(f"the connection ended at {start} of {file.size} bytes")


def _write(sink: Any, chunk: bytes) -> None:
    """All of `chunk`: an unbuffered file may take a part of it when the disk fills up."""
    view = memoryview(chunk)
    while view:
        view = view[sink.write(view) :]


def _link(store: _Store, file: RemoteFile) -> Path:
    """The snapshot entry of a finished blob, made by huggingface-hub itself."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    listing = store.listing

    def link() -> str:
        try:
            return hf_hub_download(listing.repository, file.name, revision=listing.revision, endpoint=hub.endpoint())
        except LocalEntryNotFoundError as error:  # it asks the Hub about the file first; what failed is the cause
            raise error.__cause__ or error from None

    path = Path(hub.patiently(link, what=f"{listing.repository}: {file.name}"))
    if path.resolve() != store.blob(file).resolve() and not _is_right(path, file):
        raise DsparkError(
            f"{listing.repository}: {file.name} changed while it was fetched", hint="the same command again"
        )
    return path


def _point_ref(store: _Store) -> None:
    """Other tools that use the Hub's cache look up a branch in refs/."""
    listing = store.listing
    if listing.requested == listing.revision or not (store.root / "snapshots" / listing.revision).is_dir():
        return
    ref = store.root / "refs" / listing.requested
    try:
        if not (ref.exists() and ref.read_text(encoding="ascii") == listing.revision):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.revision, encoding="ascii")
    except OSError:
        pass  # a cache that may only be read: the lock file still pins the revision


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the content is what the Hub says: sha256 of large files, git's own hash of the others."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return _sha256(path) == file.sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == file.blob


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _disk_error(error: OSError, store: _Store, file: RemoteFile) -> DsparkError:
    if error.errno == errno.ENOSPC:
        left = file.size - store.have(file)
        return NotReady(
            f"the disk of {hub_cache()} is full: {file.name} lacks {size(left)} of {size(file.size)}",
            hint="make room and repeat the command: it continues where it stopped",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return NotReady(
            f"{hub_cache()} cannot be written ({error.strerror}), and {file.name} is not in it",
            hint="HF_HUB_CACHE=/a/folder/of/yours with the same command",
        )
    return DsparkError(f"{file.name} cannot be written to {hub_cache()}: {error.strerror or error}")
