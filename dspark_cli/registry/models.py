"""models.toml: the matched target and draft checkpoints, with the user's own additions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_cli.backends.errors import DsparkError

if TYPE_CHECKING:
    from dspark_cli.registry.schema import Entry

Table = dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """One models.toml: where it is, its text, its [[model]] tables."""

    path: Path
    text: str
    models: list[Table]

    def line_of(self, model: int, keys: Iterable[str | int]) -> int:
        """The line of a key of the `model`-th table, or of the nearest thing above it. Counted from 1."""
        place = list(keys)
        drafter = place[1] if len(place) > 1 and place[0] == "drafter" and isinstance(place[1], int) else None
        names = [key for key in place[2 if drafter is not None else 0 :] if isinstance(key, str)]
        found, models, drafters, inside = 1, -1, -1, False
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := re.match(r"\s*\[\[?\s*([\w.]+)\s*\]\]?", line):
                if header[1] == "model":
                    models, drafters = models + 1, -1
                elif header[1] == "model.drafter":
                    drafters += 1
                inside = models == model and (drafters == drafter if drafter is not None else drafters == -1)
                # [model.gguf_files] belongs to the model it follows
                inside = inside or (models == model and drafter is None and header[1].split(".")[1:] == names[:1])
                if inside:
                    found = number
            elif inside and names and re.match(rf'\s*"?(?:{"|".join(map(re.escape, names))})"?\s*=', line):
                return number
        return found


def registry_file() -> Path:
    """models.toml: beside the package in a checkout, inside it when installed."""
    package = Path(str(files("dspark_cli")))
    installed = package / "data" / "models.toml"
    return installed if installed.exists() else package.parent / "models.toml"


def user_file() -> Path:
    """The user's own models.toml; it need not exist."""
    from platformdirs import user_config_path

    return user_config_path("dspark") / "models.toml"


def load_models() -> dict[str, Entry]:
    """Every target by name, in file order, the user's additions last.

    A table of the user's file whose name is known overrides that entry key by key; its drafters come first.
    Raises DsparkError naming file, line and key of what is wrong.
    """
    own = user_file()
    return _load(registry_file(), own, own.stat().st_mtime_ns if own.exists() else 0)


@lru_cache(maxsize=8)
def _load(shipped: Path, own: Path, changed_ns: int) -> dict[str, Entry]:
    sources = [_read(shipped), *([_read(own)] if changed_ns else [])]
    merged: dict[str, tuple[Table, _Source, int]] = {}
    for source in sources:
        for index, table in enumerate(source.models):
            name = table.get("name")
            if isinstance(name, str) and name in merged and merged[name][1] is not source:
                merged[name] = (_overlay(merged[name][0], table), source, index)
            elif isinstance(name, str) and name in merged:
                raise _wrong(source, index, ("name",), f"{name!r} is there twice")
            else:
                merged[name if isinstance(name, str) else f"#{source.path}{index}"] = (table, source, index)
    entries = {name: _entry(*place) for name, place in merged.items()}
    _check_names(entries, merged)
    return entries


def _read(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark at the beginning
        raw = tomllib.loads(text)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DsparkError(f"{path}: {error}") from None
    models = raw.get("model", [])
    if not isinstance(models, list) or not all(isinstance(table, dict) for table in models):
        raise DsparkError(f"{path}: targets stand in [[model]] tables", hint="[[model]] with two brackets each side")
    if other := sorted(raw.keys() - {"model"}):
        line = next(
            (n for n, text_line in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[*{other[0]}\b", text_line)), 1
        )
        raise DsparkError(f"{path}, line {line}: unknown table or key {other[0]!r}; targets stand in [[model]] tables")
    return _Source(path, text, models)


def _overlay(known: Table, own: Table) -> Table:
    drafters = [*own.get("drafter", []), *known.get("drafter", [])]
    files_ = {**known.get("gguf_files", {}), **own.get("gguf_files", {})}
    return {**known, **own, "drafter": drafters, "gguf_files": files_}


def _entry(table: Table, source: _Source, index: int) -> Entry:
    from pydantic import ValidationError

    from dspark_cli.registry.schema import Entry

    try:
        return Entry.model_validate(table)
    except ValidationError as error:
        # a misspelt key is also a missing one: the spelling is the better news
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        keys = tuple(first["loc"])
        raise _wrong(source, index, keys, _in_words(first), table.get("name")) from None


def _wrong(source: _Source, index: int, keys: tuple[str | int, ...], what: str, name: object = None) -> DsparkError:
    shown = ".".join(str(key + 1) if isinstance(key, int) else key for key in keys)
    whose = f"model {name!r}" if isinstance(name, str) else ""
    place = " of ".join(filter(None, (shown, whose))) or "[[model]]"
    return DsparkError(f"{source.path}, line {source.line_of(index, keys)}: {place}: {what}")


def _in_words(error: Any) -> str:
    """A pydantic complaint in our words, with the value found."""
    if error["type"] == "extra_forbidden":
        from dspark_cli.registry.schema import Entry, GgufFile, KnownDrafter

        table: Any = {"drafter": KnownDrafter, "gguf_files": GgufFile}.get(str(error["loc"][0]), Entry)
        import difflib

        near = difflib.get_close_matches(str(error["loc"][-1]), table.model_fields, n=1)
        return "unknown key" + (f", did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return "is missing"
    message = str(error["msg"])
    for theirs, ours in (
        ("Value error, ", ""),
        ("Input should be ", ""),
        ("String should ", ""),
        ("dictionary", "table"),
    ):
        message = message.replace(theirs, ours)
    return message if isinstance(error["input"], dict) else f"{message} (found {error['input']!r})"


def _check_names(entries: dict[str, Entry], places: dict[str, tuple[Table, _Source, int]]) -> None:
    """No word may mean two targets."""
    taken: dict[str, str] = {}
    for name, entry in entries.items():
        for word in (entry.name, *entry.aliases):
            other = taken.setdefault(word.lower(), entry.name)
            if other != entry.name:
                key = "name" if word == entry.name else "aliases"
                _, source, index = places[name]
                raise _wrong(source, index, (key,), f"{word!r} already means {other!r}", entry.name)


def names() -> dict[str, Entry]:
    """Every name and alias in lower case, with its entry."""
    return {word.lower(): entry for entry in load_models().values() for word in (entry.name, *entry.aliases)}


def find(name: str) -> Entry:
    """The entry of a name or alias, any case. Raises BadInput with the nearest names."""
    import difflib

    from dspark_cli.backends.errors import BadInput

    known = names()
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise BadInput(
        f"unknown model {name!r}",
        hint=f"{hint}`dspark models` lists all names; a Hub repository (owner/name) or a path to a GGUF file works too",
    )
