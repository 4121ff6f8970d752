"""Which path an op takes: the torch reference, or its Triton kernel. Decided once, where a target is opened.

Every op has both with one signature, and takes `path` to force one of them. The reference unless somebody asks for Triton:
where both were timed, for one sequence on an H200, a draft of seven tokens took 4.8 ms with it and 5.8 with the kernel, whose
launches from Python cost more than the memory traffic it saves (docs/cuda.md). Several sequences were not timed.
"""

from __future__ import annotations

from importlib.util import find_spec

PATHS = ("reference", "triton")

_chosen = "reference"


def installed() -> bool:
    """Whether Triton can be imported (a look, not an import)."""
    return find_spec("triton") is not None


def use(path: str) -> None:
    """From now on ops take this path unless told otherwise."""
    global _chosen
    _chosen = _known(path)


def path_for(wanted: str | None, *, on_gpu: bool) -> str:
    """The path of a call that asks for `wanted` (None = what was chosen, and the reference for tensors on a CPU)."""
    if wanted is not None:
        return _known(wanted)
    return _chosen if on_gpu else "reference"


def _known(path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}: one of {', '.join(PATHS)}")
    return path
