"""Builds the C files of this folder with this machine's compiler and puts them in front of ggml's matrix products, on x86-64
Linux.

`preload` comes before libllama is loaded, `start` after. Either gives up quietly where something is missing: ggml computes
everything then, slower and with other last bits in a pass of several tokens. `state` says which it is, and why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_kernels.c", "cpu_drafter.c"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("cpu_kernels.h", "cpu_lanes.h", "cpu_rows.h"))
#: "off": not used, to compare with ggml's own products
SWITCH = "DSPARK_CPU_KERNELS"
#: where the built library is kept instead of the user's cache folder
FOLDER = "DSPARK_CPU_KERNELS_DIR"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
#: for the drafter, which shares ggml's threads; a compiler that lacks it builds the rest
OPENMP = "-fopenmp"
COMPILERS = ("cc", "gcc", "clang")
BUILD_S = 60.0
DIGEST_BYTES = 32
#: ggml types it may compute -> the word for them (a bit each in what `dspark_kernels_start` returns)
TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}


NOT_LOADED, NO_COMPILER = "not loaded", "no C compiler (cc, gcc or clang)"


@dataclass(frozen=True)
class State:
    """types: formats of weights whose products are computed here; problem: why there are none, None if there are.

    amx: ggml was built for AMX and the processor has it: quantized weights are laid out for its own products then
    """

    types: tuple[str, ...] = ()
    problem: str | None = None
    amx: bool = False


class InitParams(ctypes.Structure):  # ggml.h
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_loaded: Any = None
_state = State(problem=NOT_LOADED)


def state() -> State:
    return _state


def complete() -> bool:
    """Whether products of all `TYPES` are computed here; before libllama is loaded, whether they probably will be."""
    if _loaded is None:
        return _state.problem == NOT_LOADED and unfit() is None
    return set(_state.types) == set(TYPES.values()) and not _state.amx


@cache
def identity() -> str:
    """Which products these are. Costs measured with others do not count."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))).hexdigest()[:12]


def unfit() -> str | None:
    """Why they cannot be used here, as far as can be told without building: None if they probably can."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return f"{SWITCH}=off"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"not written for {platform.system()} on {platform.machine()}"
    flags = _cpu_flags()
    if not {"avx2", "fma", "f16c"} <= set(flags.split()):
        return "this processor has no AVX2, FMA and F16C"
    # Rows are shared out evenly: threads on slower cores would keep the others waiting (ggml hands out pieces instead).
    if Path("/sys/devices/cpu_atom").exists():
        return "this processor has cores of two kinds"
    if not _cached().exists() and compiler() is None:
        return NO_COMPILER
    return None


def compiler() -> list[str] | None:
    """The command of the C compiler: $CC, or the first that is installed."""
    if named := shlex.split(os.environ.get("CC", "")):
        return named if shutil.which(named[0]) else None
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    return [found] if found else None


@cache
def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1] for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""


def _cached() -> Path:
    """Where the built library is kept. Machines that share a home have one each: it is built for the processor."""
    built_for = hashlib.sha256(f"{identity()} {' '.join(FLAGS)} {_cpu_flags()}".encode()).hexdigest()[:16]
    folder = Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else user_cache_path("dspark") / "kernels"
    return folder / f"cpu_kernels-{built_for}.so"


def build(to: Path) -> None:
    """Compile the source to `to`, whole or not at all. Raises OSError or subprocess.SubprocessError where that fails."""
    command = compiler()
    if command is None:
        raise OSError(NO_COMPILER)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix="building-") as folder:
        made = Path(folder) / to.name
        try:
            _compile([*command, *FLAGS, OPENMP], made)
        except subprocess.CalledProcessError:
            _compile([*command, *FLAGS], made)
        with made.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        made.replace(to)


def _compile(command: list[str], to: Path) -> None:
    subprocess.run(
        [*command, "-o", str(to), *map(str, SOURCES), "-lm"],
        check=True,
        capture_output=True,
        timeout=BUILD_S,
        text=True,
        errors="replace",  # a compiler speaks the user's language
    )


def _whole(path: Path) -> bool:
    """Whether a library is there as it was built, its digest at its end: loading one cut short kills the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def preload() -> None:
    """Load the library, building it the first time (some seconds), so that ggml's calls find it. Before libllama loads."""
    global _loaded, _state
    if _loaded is not None:
        return
    if (problem := unfit()) is not None:
        _state = State(problem=problem)
        return
    path = _cached()
    try:
        if not _whole(path):
            build(path)
        _loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        _state = State(problem=f"could not be compiled: {said[0] if said else error}")
    except (OSError, subprocess.SubprocessError) as error:
        _state = State(problem=f"could not be built: {error}")


def loaded() -> Any:
    """Our own library. Raises RuntimeError where there is none."""
    if _loaded is None:
        raise RuntimeError(f"no kernels here: {_state.problem}")
    return _loaded


def library() -> Path | None:
    """The file of ggml's CPU backend that this process has loaded: wheels hold copies, and each would be another library."""
    mapped = (line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines())
    return next((Path(path) for path in mapped if Path(path).name.startswith("libggml-cpu")), None)


def start() -> None:
    """Compare with ggml's own dot products; compute the formats that agree from now on. After libllama loads."""
    global _state
    if _loaded is None:
        return
    try:
        ggml = ctypes.CDLL(str(library()))
        traits = ggml.ggml_get_type_traits_cpu
        ggml.ggml_cpu_init()  # tables that its dot products read
    except (OSError, AttributeError) as error:
        _state = State(problem=f"this build of ggml has no place for them: {error}")
        return
    _loaded.dspark_kernels_start.restype = ctypes.c_uint64
    bits = int(_loaded.dspark_kernels_start(traits))
    types = tuple(word for bit, word in TYPES.items() if bits >> bit & 1)
    if not types:
        _state = State(problem="ggml's dot products on this machine are others")
    elif not _reached(ggml):
        _state = State(problem="ggml does not ask for them: another part of this process loaded it first")
    else:
        _state = State(types, amx=bool(ggml.ggml_cpu_has_amx_int8()))


def _reached(ggml: Any) -> bool:
    """Whether a product that ggml is to compute is asked of us: F32 [64, 2] by [64, 2], in a graph of its own."""
    asked = _loaded.dspark_kernels_asked
    asked.restype = ctypes.c_long

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(ggml, name)  # of libggml-base: ggml-cpu's handle finds what it is linked with
        function.restype = result
        return function(*arguments)

    pointer, before = ctypes.c_void_p, asked()
    context = pointer(call("ggml_init", pointer, InitParams(1 << 20, None, False)))
    try:
        a, b = (
            pointer(call("ggml_new_tensor_2d", pointer, context, 0, ctypes.c_int64(64), ctypes.c_int64(2)))
            for _ in range(2)
        )
        product = pointer(call("ggml_mul_mat", pointer, context, a, b))
        graph = pointer(call("ggml_new_graph", pointer, context))
        call("ggml_build_forward_expand", None, graph, product)
        call("ggml_graph_compute_with_ctx", ctypes.c_int, context, graph, 1)
    finally:
        call("ggml_free", None, context)
    return bool(asked() > before)
