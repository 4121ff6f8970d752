"""What this machine can put weights on: ggml's devices, torch's, and ordinary memory."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from dspark_cli.registry.choose import Machine
from dspark_cli.registry.plan import Device

_KINDS = (
    ("CUDA", "cuda"),
    ("ROCm", "rocm"),
    ("HIP", "rocm"),
    ("Metal", "metal"),
    ("MTL", "metal"),
    ("Vulkan", "vulkan"),
)


def this_machine() -> Machine:
    """Devices with what is free on them now. A library that is missing or broken only means fewer devices."""
    import psutil

    memory = psutil.virtual_memory()
    cpu = Device("cpu", "cpu", memory.total, memory.available, ("llamacpp",))
    torch_devices, torch_works = _torch_devices()
    return Machine(cpu, _merged(_ggml_devices(), torch_devices), torch_works)


def _ggml_devices() -> list[Device]:
    try:
        from dspark_cli.backends.llamacpp.native import devices
    except (ImportError, OSError, RuntimeError):
        return []
    found = []
    for facts in devices():
        kind = next((kind for begin, kind in _KINDS if facts["name"].startswith(begin)), None)
        if kind is not None:
            unified = kind == "metal"
            found.append(Device(facts["name"], kind, facts["total_bytes"], facts["free_bytes"], ("llamacpp",), unified))
    return found


def _torch_devices() -> tuple[list[Device], bool]:
    """(devices, whether torch works). torch takes seconds to import: only where it could bring a device is it asked."""
    if importlib.util.find_spec("torch") is None:
        return [], False
    if "torch" not in sys.modules and driver() is None:
        return [], torch_looks_whole()
    try:
        from dspark_cli.backends.torch.devices import detect

        found = sorted((facts for facts in detect() if facts.kind != "cpu"), key=lambda facts: facts.index)
    except Exception:  # a half-installed torch fails in many ways; `doctor` says which
        return [], False
    names = {"cuda": "CUDA{}", "rocm": "ROCm{}", "metal": "Metal"}  # as ggml calls them
    return [
        Device(names[f.kind].format(f.index), f.kind, f.total, f.free, ("torch",), unified=f.kind == "metal")
        for f in found
    ], True


def torch_looks_whole() -> bool:
    """Whether torch's native library is where it should be: a look at the disk, as importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    return any((folder / "version.py").exists() and any(folder.glob("_C*")) for folder in folders)


@cache
def torch_problem() -> str | None:
    """Why torch cannot be imported, in one line; None if it can, or is not installed. Asked in a process of its own."""
    if importlib.util.find_spec("torch") is None or "torch" in sys.modules:
        return None
    code = "import torch, sys; torch.ones(1).sum().item()"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"python ended with {done.returncode}"


def driver() -> str | None:
    """The kind of GPU that this system has a driver for, whether or not a library here can use it."""
    if platform.system() == "Darwin":
        return "metal" if platform.machine() == "arm64" else None
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None:
        return "cuda"
    if Path("/dev/kfd").exists():
        return "rocm"
    return "cuda" if Path("/dev/dxg").exists() else None  # Windows' own, under Linux


def _merged(ggml: list[Device], torch: list[Device]) -> tuple[Device, ...]:
    """One entry a physical device: the n-th of a kind is the same for both libraries."""
    found = list(ggml)
    for device in torch:
        same = [i for i, other in enumerate(found) if other.kind == device.kind and "torch" not in other.runs]
        if same:
            other = found[same[0]]
            found[same[0]] = replace(other, free=min(other.free, device.free), runs=("llamacpp", "torch"))
        else:
            found.append(device)
    return tuple(sorted(found, key=lambda device: -device.free))
