"""What torch can use here and how: one table of device kinds, and the decisions that follow from it.

`detect` asks torch; everything after it works on plain `Facts`, so every decision is tested without the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_cli.backends.base import BadInput, NotReady
from dspark_cli.kernels.dispatch import PATHS

CAPTURES = ("auto", "off", "graph", "compile")
#: families whose activations leave the range of float16 (their cards ask for bfloat16 or float32)
NOT_IN_FLOAT16 = ("gemma",)


@dataclass(frozen=True)
class Facts:
    """One device as torch describes it.

    kind:       cuda, rocm, metal or cpu
    index:      its number among its kind
    total:      bytes; free: bytes that could be allocated now
    capability: CUDA compute capability; (0, 0) elsewhere
    arch:       ROCm's name of the chip ("gfx1100"); "" elsewhere
    bf16:       whether it multiplies bfloat16 at full speed
    """

    kind: str
    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int] = (0, 0)
    arch: str = ""
    bf16: bool = False

    @property
    def torch_name(self) -> str:
        """What `torch.device` calls it."""
        prefix = KINDS[self.kind].torch_name
        return f"{prefix}:{self.index}" if KINDS[self.kind].numbered else prefix


@dataclass(frozen=True)
class Kind:
    """What is possible on a kind of device.

    torch_name: how torch calls it; numbered: whether there may be several
    fallback:   dtype for a bfloat16 checkpoint where bfloat16 is missing or slow
    half:       whether float16 is worth computing in (CPUs convert every product)
    capture:    how verify passes of a fixed width are recorded: "graph" (CUDA or HIP graphs) or "off"
    triton:     whether the Triton kernels run there
    """

    torch_name: str
    numbered: bool
    fallback: str
    half: bool
    capture: str
    triton: bool


KINDS = {
    "cuda": Kind("cuda", True, fallback="float16", half=True, capture="graph", triton=True),
    "rocm": Kind("cuda", True, fallback="float16", half=True, capture="graph", triton=True),
    "metal": Kind("mps", False, fallback="float16", half=True, capture="off", triton=False),
    "cpu": Kind("cpu", False, fallback="float32", half=False, capture="off", triton=False),
}
#: words for --backend that leave the kind open
ANY = ("auto", "torch")


def detect(torch: Any = None) -> list[Facts]:
    """Every device torch can use, accelerators first, the freest first among them; the CPU is last."""
    torch = torch or importlib.import_module("torch")
    found = [*_cuda_or_rocm(torch), *_metal(torch)]
    return [*sorted(found, key=lambda facts: -facts.free), _cpu(torch)]


def _cuda_or_rocm(torch: Any) -> Iterator[Facts]:
    if not torch.cuda.is_available():
        return
    kind = "rocm" if torch.version.hip else "cuda"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor) if kind == "cuda" else (0, 0)
        arch = str(getattr(properties, "gcnArchName", "")).partition(":")[0] if kind == "rocm" else ""
        fast = capability >= (8, 0) if kind == "cuda" else _matrix_bf16(arch)
        yield Facts(kind, index, properties.name, total, free, capability, arch, bf16=fast)


def _matrix_bf16(arch: str) -> bool:
    """Whether a ROCm chip has bfloat16 matrix instructions: CDNA (gfx908 and later gfx9) and RDNA 3 on (gfx11, gfx12)."""
    return arch in ("gfx908", "gfx90a") or arch.startswith(("gfx94", "gfx95", "gfx11", "gfx12"))


def _metal(torch: Any) -> Iterator[Facts]:
    if not torch.backends.mps.is_available():
        return
    total = int(torch.mps.recommended_max_memory())
    free = max(0, total - int(torch.mps.driver_allocated_memory()))
    yield Facts("metal", 0, "Metal", total, free, bf16=bool(torch.backends.mps.is_macos_or_newer(14, 0)))


def _cpu(torch: Any) -> Facts:
    import psutil

    memory = psutil.virtual_memory()
    return Facts("cpu", 0, "cpu", memory.total, memory.available, bf16=_cpu_bf16(torch))


def _cpu_bf16(torch: Any) -> bool:
    """Whether the CPU has bfloat16 matrix instructions (AMX, AVX512-BF16); without them it is slower than float32."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in asked)


def pick(word: str, devices: Sequence[Facts]) -> Facts:
    """The device that `--backend WORD` means. Raises NotReady for one that is not here, BadInput for an unknown word."""
    kind, _, number = word.partition(":")
    if kind not in (*ANY, *KINDS) or (number and not number.isdecimal()):
        raise BadInput(f"unknown torch device {word!r}: one of {', '.join((*ANY, *KINDS))}")
    fitting = [facts for facts in devices if kind in (*ANY, facts.kind)]
    if number:
        fitting = [facts for facts in fitting if facts.index == int(number)]
    if not fitting:
        have = ", ".join(f"{facts.kind}:{facts.index}" if facts.kind != "cpu" else "cpu" for facts in devices)
        raise NotReady(f"torch finds no {word} device on this machine; it finds {have}", hint="dspark doctor")
    return fitting[0]


def dtype_for(stored: str, facts: Facts, family: str = "") -> str:
    """The dtype to compute in, for weights stored as float32, bfloat16 or float16.

    Stored precision is kept where the device computes in it at speed. family: the checkpoint's model_type.
    """
    kind = KINDS[facts.kind]
    if stored == "bfloat16":
        if facts.bf16:
            return "bfloat16"
        return "float32" if family.startswith(NOT_IN_FLOAT16) else kind.fallback
    if stored == "float16" and kind.half:
        return "float16"
    return "float32"


def capture_for(wanted: str, facts: Facts) -> str:
    """ "graph", "compile" or "off" for the switch `wanted`. Raises BadInput where that cannot be."""
    if wanted not in CAPTURES:
        raise BadInput(f"unknown capture {wanted!r}: one of {', '.join(CAPTURES)}")
    possible = KINDS[facts.kind].capture
    if wanted == "auto":
        return possible
    if wanted == "graph" and possible != "graph":
        raise BadInput(f"graphs cannot be captured on {facts.kind}", hint="DSPARK_CAPTURE=off or compile")
    return wanted


def kernels_for(wanted: str, facts: Facts, installed: Callable[[], bool]) -> str:
    """`wanted`, a path of kernels/dispatch.py. Raises BadInput for another word and where Triton does not run.

    Triton runs where the kind has it and the package is there (CUDA: from compute 7.0).
    """
    if wanted not in PATHS:
        raise BadInput(f"unknown kernels {wanted!r}: one of {', '.join(PATHS)}")
    able = KINDS[facts.kind].triton and (facts.kind != "cuda" or facts.capability >= (7, 0))
    if wanted == "triton" and not (able and installed()):
        why = "is not installed" if able else f"does not run on {facts.name}"
        raise BadInput(f"Triton {why}", hint="DSPARK_KERNELS=reference")
    return wanted


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch says it in several ways (CUDA and ROCm by type, Metal and CPUs by words)."""
    said = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
        "status_alloc_failed",
    )
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in said)
