"""The first look at a GGUF file, before any library sees it. Imports nothing heavy: name resolution uses it too."""

from __future__ import annotations

from pathlib import Path

from dspark_cli.backends.errors import DsparkError

MAGIC = b"GGUF"


def check_file(path: Path) -> Path:
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
    if magic != MAGIC:
        raise DsparkError(f"{path} is not a GGUF file: it starts with {magic!r} instead of {MAGIC!r}")
    return path
