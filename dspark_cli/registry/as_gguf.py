"""A drafter's checkpoint beside a GGUF target: the file that libllama runs, written once and kept in the cache folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dspark_cli.backends.errors import DsparkError, NotReady
from dspark_cli.registry.plan import size

FORMAT = "Q8_0"


def gguf_copy(folder: Path) -> Path:
    """Where the copy of a snapshot folder of the Hub's cache lies, or would lie."""
    return _copies() / f"{repository_of(folder).replace('/', '--')}@{folder.name[:12]}-{FORMAT}.gguf"


def copies_of(repository: str) -> list[Path]:
    """Every copy made of a repository, of any revision."""
    return sorted(_copies().glob(f"{repository.replace('/', '--')}@*.gguf"))


def repository_of(folder: Path) -> str:
    """owner/name of a snapshot folder (models--owner--name/snapshots/REVISION)."""
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def _copies() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("dspark") / "drafters"


def check_convertible(folder: Path) -> None:
    """Raise DsparkError for a drafter that libllama has no graph for; its config.json is all that is read."""
    from dspark_cli.backends.torch.dialects import read_config
    from dspark_cli.backends.torch.gguf_drafter import spec_of

    spec_of(read_config(folder))


def write_copy(folder: Path, target: Path) -> Path:
    """Convert, in a process of its own so that its memory comes back. Raises DsparkError with what it says."""
    import psutil

    copy = gguf_copy(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed, free = 3 * weights, psutil.virtual_memory().available  # in float32, and the target's tables
    if needed > free:
        raise NotReady(
            f"converting {repository_of(folder)} to GGUF takes about {size(needed)} of memory, {size(free)} are free"
        )
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DsparkError(f"{copy.parent} cannot be made: {error.strerror}") from None
    partial = copy.with_name(f"part-{copy.name}")
    command = [sys.executable, "-m", "dspark_cli", "convert", str(folder), str(partial), "--force"]
    command += ["--target", str(target), "--format", FORMAT]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in said if line.startswith("error: ")), said[-1] if said else "no reason given")
        raise DsparkError(f"it could not be converted to GGUF: {reason.removeprefix('error: ')}")
    partial.replace(copy)
    return copy
