"""Decisions about devices, on made-up properties: none of these machines need exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from dspark_cli.backends.base import BadInput, NotReady
from dspark_cli.backends.torch import devices as torch_devices
from dspark_cli.backends.torch.devices import Facts, capture_for, detect, dtype_for, kernels_for, pick

GB = 10**9


def cuda_device(name: str, capability: tuple[int, int], free: int, arch: str = "") -> SimpleNamespace:
    major, minor = capability
    return SimpleNamespace(name=name, major=major, minor=minor, gcnArchName=arch, free=free, total=free + GB)


def fake_torch(devices: list[SimpleNamespace], *, hip: str | None = None, macos: int | None = None) -> Any:
    """As much of torch as detection looks at. macos: major version of a Mac with Metal."""
    return SimpleNamespace(
        version=SimpleNamespace(hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: bool(devices),
            device_count=lambda: len(devices),
            get_device_properties=lambda i: devices[i],
            mem_get_info=lambda i: (devices[i].free, devices[i].total),
        ),
        backends=SimpleNamespace(
            mps=SimpleNamespace(
                is_available=lambda: macos is not None,
                is_macos_or_newer=lambda major, minor: (macos or 0) >= major,
            )
        ),
        mps=SimpleNamespace(recommended_max_memory=lambda: 20 * GB, driver_allocated_memory=lambda: 4 * GB),
        cpu=SimpleNamespace(),
    )


TWO_CUDA = fake_torch([cuda_device("T4", (7, 5), 10 * GB), cuda_device("H100", (9, 0), 70 * GB)])
#: name -> torch as it would look there
MACHINES = {
    "old cuda": fake_torch([cuda_device("P4", (6, 1), 7 * GB)]),
    "turing": fake_torch([cuda_device("T4", (7, 5), 14 * GB)]),
    "ampere": fake_torch([cuda_device("A10", (8, 6), 22 * GB)]),
    "cdna": fake_torch([cuda_device("MI300X", (9, 4), 190 * GB, "gfx942:sramecc+:xnack-")], hip="6.2"),
    "rdna2": fake_torch([cuda_device("RX 6800", (10, 3), 15 * GB, "gfx1030")], hip="6.2"),
    "rdna3": fake_torch([cuda_device("RX 7900", (11, 0), 23 * GB, "gfx1100")], hip="6.2"),
    "mac": fake_torch([], macos=15),
    "old mac": fake_torch([], macos=13),
    "cpu": fake_torch([]),
}


def test_the_freest_accelerator_comes_first_and_the_cpu_last() -> None:
    found = detect(TWO_CUDA)
    assert [(facts.kind, facts.index, facts.torch_name) for facts in found] == [
        ("cuda", 1, "cuda:1"),
        ("cuda", 0, "cuda:0"),
        ("cpu", 0, "cpu"),
    ]
    assert found[0].capability == (9, 0)


@pytest.mark.parametrize(
    ("machine", "kind", "bf16", "for_bf16", "for_fp16", "for_fp32", "for_gemma", "capture", "triton"),
    [
        ("old cuda", "cuda", False, "float16", "float16", "float32", "float32", "graph", False),
        ("turing", "cuda", False, "float16", "float16", "float32", "float32", "graph", True),
        ("ampere", "cuda", True, "bfloat16", "float16", "float32", "bfloat16", "graph", True),
        ("cdna", "rocm", True, "bfloat16", "float16", "float32", "bfloat16", "graph", True),
        ("rdna2", "rocm", False, "float16", "float16", "float32", "float32", "graph", True),
        ("rdna3", "rocm", True, "bfloat16", "float16", "float32", "bfloat16", "graph", True),
        ("mac", "metal", True, "bfloat16", "float16", "float32", "bfloat16", "off", False),
        ("old mac", "metal", False, "float16", "float16", "float32", "float32", "off", False),
        ("cpu", "cpu", False, "float32", "float32", "float32", "float32", "off", False),
    ],
)
def test_what_a_machine_computes_in_and_how(
    machine: str,
    kind: str,
    bf16: bool,
    for_bf16: str,
    for_fp16: str,
    for_fp32: str,
    for_gemma: str,
    capture: str,
    triton: bool,
) -> None:
    facts = pick("auto", detect(MACHINES[machine]))
    assert (facts.kind, facts.bf16) == (kind, bf16)
    assert dtype_for("bfloat16", facts, "qwen3") == for_bf16
    assert dtype_for("float16", facts, "qwen3") == for_fp16
    assert dtype_for("float32", facts, "qwen3") == for_fp32
    assert dtype_for("bfloat16", facts, "gemma4_unified") == for_gemma
    assert capture_for("auto", facts) == capture
    assert kernels_for("reference", facts, lambda: True) == "reference"
    if triton:
        assert kernels_for("triton", facts, lambda: True) == "triton"
    with pytest.raises(BadInput, match="is not installed" if triton else f"does not run on {facts.name}"):
        kernels_for("triton", facts, lambda: not triton)
    with pytest.raises(BadInput, match="unknown kernels 'metal': one of reference, triton"):
        kernels_for("metal", facts, lambda: True)


def test_a_cpu_with_bfloat16_instructions_keeps_bfloat16() -> None:
    machine = fake_torch([])
    machine.cpu = SimpleNamespace(_is_avx512_bf16_supported=lambda: True)
    assert dtype_for("bfloat16", pick("cpu", detect(machine))) == "bfloat16"


def test_a_device_by_its_word() -> None:
    found = detect(TWO_CUDA)
    assert pick("torch", found).name == "H100"
    assert pick("cuda:0", found).name == "T4"
    assert pick("cpu", found).kind == "cpu"


@pytest.mark.parametrize("word", ["cuda", "rocm", "metal", "cuda:3"])
def test_a_device_that_is_not_there(word: str) -> None:
    with pytest.raises(NotReady, match=rf"no {word} device.*it finds cpu") as error:
        pick(word, detect(MACHINES["cpu"]))
    assert error.value.exit_code == 3


@pytest.mark.parametrize("word", ["tpu", "cuda:x", "", "cuda:-1"])
def test_a_word_that_is_none(word: str) -> None:
    with pytest.raises(BadInput, match="unknown torch device"):
        pick(word, detect(MACHINES["cpu"]))


def test_the_capture_switch() -> None:
    gpu, cpu = pick("auto", detect(MACHINES["ampere"])), pick("cpu", detect(MACHINES["cpu"]))
    assert capture_for("off", gpu) == "off"
    assert capture_for("compile", cpu) == "compile"
    with pytest.raises(BadInput, match="cannot be captured on cpu"):
        capture_for("graph", cpu)
    with pytest.raises(BadInput, match="unknown capture"):
        capture_for("maybe", gpu)


def test_the_memory_plan_sees_the_same_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their numbers, so that the n-th is ggml's n-th too, whichever is freest."""
    from dspark_cli.registry import devices as registry

    for machine, wanted in (
        (TWO_CUDA, [("CUDA0", "cuda", 10 * GB), ("CUDA1", "cuda", 70 * GB)]),
        (MACHINES["rdna3"], [("ROCm0", "rocm", 23 * GB)]),
        (MACHINES["mac"], [("Metal", "metal", 16 * GB)]),
        (MACHINES["cpu"], []),
    ):
        monkeypatch.setattr(torch_devices, "detect", lambda machine=machine: detect(machine))
        found, works = registry._torch_devices()
        assert works
        assert [(device.name, device.kind, device.free) for device in found] == wanted
        assert all(device.runs == ("torch",) for device in found)


def test_this_machine_can_be_asked() -> None:
    found = detect()
    assert found[-1].kind == "cpu"
    assert found[-1].total > found[-1].free > 0
    assert all(isinstance(facts, Facts) for facts in found)
