"""models.toml: the matched target and draft checkpoints, and what of them is on this disk."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import DsparkError


@dataclass(frozen=True)
class KnownDrafter:
    """A drafter published or shipped for a target.

    builtin:         file under dspark_cli/drafters, when it ships with this package
    accepted_length: tau by benchmark as `source` publishes it
    """

    kind: str
    format: str
    repository: str | None = None
    file: str | None = None
    builtin: str | None = None
    block_size: int | None = None
    accepted_length: dict[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def path(self) -> Path | None:
        """Where it lies on this disk; None if it does not."""
        if self.builtin:
            shipped = Path(str(files("dspark_cli"))) / "drafters" / self.builtin
            return shipped if shipped.exists() else None
        return cached_file(self.repository, self.file)


@dataclass(frozen=True)
class Entry:
    """One target of models.toml."""

    name: str
    family: str
    parameters: str
    aliases: tuple[str, ...] = ()
    context: int | None = None
    n_layer: int | None = None
    n_embd: int | None = None
    n_head_kv: int | None = None
    head_dim: int | None = None
    n_vocab: int | None = None
    thinking: str | None = None
    licence: str | None = None
    package: str | None = None
    safetensors: str | None = None
    gguf: str | None = None
    gguf_files: dict[str, str] = field(default_factory=dict)
    note: str | None = None
    drafter: tuple[KnownDrafter, ...] = ()

    def on_disk(self) -> dict[str, Path]:
        """GGUF files of this target that are here: format -> path."""
        found = {form: self._path(name) for form, name in self.gguf_files.items()}
        return {form: path for form, path in found.items() if path is not None}

    def _path(self, name: str) -> Path | None:
        return package_file(self.package, name) if self.package else cached_file(self.gguf, name)


def package_file(package: str, name: str) -> Path | None:
    """A data file of an installed Python package; None if either is missing."""
    if find_spec(package) is None:
        return None
    return next(Path(str(files(package))).rglob(name), None)


def cached_file(repository: str | None, name: str | None) -> Path | None:
    """A file of a Hub repository in the local cache, without asking the network."""
    if not repository or not name:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def registry_file() -> Path:
    """models.toml: beside the package in a checkout, inside it when installed."""
    package = Path(str(files("dspark_cli")))
    installed = package / "data" / "models.toml"
    return installed if installed.exists() else package.parent / "models.toml"


@cache
def load_models() -> dict[str, Entry]:
    """Every target by name, in file order. Raises DsparkError naming the entry and key that are wrong."""
    path = registry_file()
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DsparkError(f"{path}: {error}") from None
    return {entry.name: entry for entry in map(_entry, raw.get("model", []))}


def _entry(raw: dict[str, Any]) -> Entry:
    name = raw.get("name", "without a name")
    try:
        drafters = tuple(KnownDrafter(**drafter) for drafter in raw.pop("drafter", []))
        return Entry(**{**raw, "aliases": tuple(raw.get("aliases", ())), "drafter": drafters})
    except TypeError as error:
        raise DsparkError(f"models.toml, model {name}: {str(error).rpartition('__init__() ')[2]}") from None
