"""What of the registry is on this disk: the Hub's cache, installed packages, files that ship with dspark. No network."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_cli.registry.quants import is_target_file, parts_of, quant_of, rank, whole_name

if TYPE_CHECKING:
    from dspark_cli.registry.schema import Entry


def builtin_file(name: str) -> Path | None:
    """A drafter that ships with this package."""
    shipped = Path(str(files("dspark_cli"))) / "drafters" / name
    return shipped if shipped.exists() else None


def package_file(package: str, name: str) -> Path | None:
    """A data file of an installed Python package; None if either is missing."""
    if find_spec(package) is None:
        return None
    return next(Path(str(files(package))).rglob(name), None)


def hub_cache() -> Path:
    """The Hub's own cache folder (HF_HUB_CACHE, HF_HOME or its default)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot(repository: str | None) -> Path | None:
    """The folder of a repository's files as they were last pulled: the locked revision, else `main`."""
    if not repository:
        return None
    from huggingface_hub.file_download import repo_folder_name

    from dspark_cli.registry.lock import locked

    folder = hub_cache() / repo_folder_name(repo_id=repository, repo_type="model")
    entry = locked(repository)
    if entry is not None and (folder / "snapshots" / entry.revision).is_dir():
        return folder / "snapshots" / entry.revision
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / "snapshots" / commit if commit and (folder / "snapshots" / commit).is_dir() else None


def cached_file(repository: str | None, name: str | None) -> Path | None:
    """A file of a Hub repository in the cache; of a split one its first part, when all parts are there."""
    folder = snapshot(repository)
    if folder is None or not name:
        return None
    if (folder / name).is_file():
        return _complete(folder / name)
    pattern = f"{name.removesuffix('.gguf')}-00001-of-*.gguf"
    return next((path for path in sorted(folder.glob(pattern)) if _complete(path)), None)


def cached_quants(entry: Entry) -> dict[str, Path]:
    """Complete GGUF files of a target in the cache, best quant first."""
    found: dict[str, Path] = {}
    for quant, file in entry.gguf_files.items():
        path = next(filter(None, (cached_file(repo, file.file) for repo in repositories(entry))), None)
        if path is not None:
            found[quant] = path
    for repository in repositories(entry):
        for name, path in gguf_files(snapshot(repository)).items():
            named = quant_of(name)
            if named and is_target_file(name):
                found.setdefault(named, path)
    return dict(sorted(found.items(), key=lambda item: rank(item[0])))


def repositories(entry: Entry) -> list[str]:
    """GGUF repositories of a target, the preferred one first."""
    return [repository for repository in (entry.gguf, *entry.gguf_mirrors) if repository]


def gguf_files(folder: Path | None) -> dict[str, Path]:
    """Complete GGUF files in a folder: name without part numbers -> the file, or the first of its parts."""
    if folder is None:
        return {}
    firsts = (path for path in sorted(folder.rglob("*.gguf")) if path.name == parts_of(path.name)[0])
    return {whole_name(path.name): path for path in firsts if _complete(path)}


def cached_checkpoint(repository: str | None) -> Path | None:
    """The folder of a safetensors checkpoint in the cache, when its config and weights are all there."""
    folder = snapshot(repository)
    if folder is None or not (folder / "config.json").exists():
        return None
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return folder if (folder / "model.safetensors").exists() else None
    import json

    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return folder if all((folder / name).exists() for name in names) else None


def _complete(path: Path) -> Path | None:
    """`path` if it and all its parts are there (a broken link is not)."""
    return path if all((path.parent / name).exists() for name in parts_of(path.name)) else None
