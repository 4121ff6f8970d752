"""What of the Hub's cache dspark pulled, and taking it away again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.registry.as_gguf import copies_of
from dspark_cli.registry.disk import hub_cache, repositories
from dspark_cli.registry.lock import forget, locked, read_lock
from dspark_cli.registry.models import find
from dspark_cli.registry.resolve import is_repository


@dataclass(frozen=True)
class Removal:
    """One repository's files to go; contents that another revision uses stay.

    freed: bytes that come free; links: snapshot entries
    blobs: their contents, unfinished downloads and GGUF copies included
    shared: other targets of the registry that read files of this repository
    """

    repository: str
    links: list[Path]
    blobs: list[Path]
    freed: int
    shared: tuple[str, ...] = ()


def removal(model: str) -> list[Removal]:
    """What `rm model` would take away: the target's files and, unless another pulled model uses it, its drafter's."""
    targets = [model] if is_repository(model) else repositories(entry := find(model))
    if not is_repository(model):
        if entry.package:
            raise BadInput(
                f"{entry.name} came with a Python package", hint=f"pip uninstall {entry.package.replace('_', '-')}"
            )
        targets += [entry.safetensors] if entry.safetensors else []
        targets += [
            d.repository for d in entry.drafter if d.repository and not _used_elsewhere(d.repository, entry.name)
        ]
    found = [plan for repository in dict.fromkeys(targets) if (plan := _of(repository)) is not None]
    if not is_repository(model):
        found = [replace(plan, shared=_targets_of(plan.repository, entry.name)) for plan in found]
    if not found:
        raise DsparkError(f"nothing of {model} is on this disk", hint="dspark models")
    return found


def pulled() -> list[Removal]:
    """Every repository in the lock file with what it takes on disk."""
    return [plan for repository in read_lock() if (plan := _of(repository)) is not None]


def carry_out(removals: list[Removal]) -> int:
    """Delete; returns the bytes freed. Raises DsparkError when a file cannot be deleted."""
    for item in removals:
        try:
            for path in (*item.links, *item.blobs):
                path.unlink(missing_ok=True)
            _tidy(item.repository)
        except OSError as error:
            raise DsparkError(f"{error.filename} cannot be deleted: {error.strerror}") from None
        forget(item.repository)
    return sum(item.freed for item in removals)


def _tidy(repository: str) -> None:
    """Take away what nothing needs any more: empty folders, and branch names of revisions that are gone.

    The Hub's own tools call a cache with such names damaged.
    """
    root = _folder(repository)
    for folder in sorted((path for path in (root / "snapshots").rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    refs = [path for path in (root / "refs").rglob("*") if path.is_file()]
    for ref in refs:
        if not (root / "snapshots" / ref.read_text(encoding="ascii", errors="replace").strip()).is_dir():
            ref.unlink()
    if not any(path.is_file() or path.is_symlink() for path in root.rglob("*")):
        shutil.rmtree(root, ignore_errors=True)


def _folder(repository: str) -> Path:
    """Where the Hub's cache keeps a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return hub_cache() / str(repo_folder_name(repo_id=repository, repo_type="model"))


def _of(repository: str) -> Removal | None:
    root = _folder(repository)
    if not root.is_dir():
        return None
    entry = locked(repository)
    snapshots = root / "snapshots"
    mine = [snapshots / entry.revision] if entry is not None else list(snapshots.glob("*"))
    links = [path for folder in mine for path in folder.rglob("*") if not path.is_dir()]
    own = set(links)
    others = {path.resolve() for path in snapshots.rglob("*") if path.is_symlink() and path not in own}
    blobs = {path.resolve() for path in links if path.is_symlink()} - others
    blobs = {path for path in blobs if path.is_relative_to(root.resolve()) and path.is_file()}
    blobs |= set((root / "blobs").glob("*.incomplete")) if (root / "blobs").is_dir() else set()
    copies = [path for path in links if not path.is_symlink()]
    blobs |= set(copies_of(repository))
    freed = sum(path.stat().st_size for path in (*blobs, *copies))
    return Removal(repository, links, sorted(blobs), freed) if links or blobs else None


def _targets_of(repository: str, name: str) -> tuple[str, ...]:
    """Targets other than `name` whose own files a repository holds."""
    from dspark_cli.registry.models import load_models

    entries = load_models().values()
    return tuple(e.name for e in entries if e.name != name and repository in (*repositories(e), e.safetensors))


def _used_elsewhere(repository: str, name: str) -> bool:
    """Whether another target with files here has this drafter."""
    from dspark_cli.registry.models import load_models

    return any(
        entry.name != name and any(d.repository == repository for d in entry.drafter) and entry.on_disk()
        for entry in load_models().values()
    )
