"""What is chosen on which machine: one pure function over a table of machines and models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.backends.torch import devices as torch_devices
from dspark_cli.registry.choose import Machine, Resolution, Wish, choose, fitting
from dspark_cli.registry.models import find, load_models
from dspark_cli.registry.plan import GIB, Device, PlanOptions, TargetSize, make_plan
from dspark_cli.registry.resolve import plan_for, resolve

GB = 10**9
#: everything on the GPU, with a context that 12 GB do not hold
LONG = PlanOptions(ctx=32768, gpu_layers=49)


def gpu(
    gib: int, kind: str = "cuda", runs: tuple[str, ...] = ("llamacpp",), ram: int = 32, torch: bool = True
) -> Machine:
    """A desktop with one GPU of `gib`, a little of it in use."""
    name = {"cuda": "CUDA0", "rocm": "ROCm0"}[kind]
    device = Device(name, kind, gib * GIB, gib * GIB - GIB // 2, runs)
    return Machine(Device("cpu", "cpu", ram * GIB, (ram - 4) * GIB), (device,), torch)


def mac(gib: int) -> Machine:
    """Unified memory: Metal's recommended maximum is about 3/4 of it."""
    share = gib * GIB * 3 // 4
    metal = Device("Metal", "metal", share, share, ("llamacpp",), unified=True)
    return Machine(Device("cpu", "cpu", gib * GIB, (gib - 5) * GIB), (metal,), True)


def cpu(gib: int, torch: bool = True) -> Machine:
    return Machine(Device("cpu", "cpu", gib * GIB, (gib - 2) * GIB), (), torch)


MACHINES = {
    "8 GB GPU": gpu(8),
    "12 GB GPU": gpu(12),
    "16 GB GPU": gpu(16),
    "24 GB GPU": gpu(24),
    "48 GB GPU": gpu(48),
    "80 GB GPU": gpu(80),
    "16 GB ROCm": gpu(16, "rocm"),
    "24 GB ROCm": gpu(24, "rocm"),
    "16 GB Mac": mac(16),
    "64 GB Mac": mac(64),
    "8 GB CPU": cpu(8),
    "16 GB CPU": cpu(16),
    "64 GB CPU": cpu(64),
    "24 GB GPU, torch": gpu(24, runs=("llamacpp", "torch")),
    "80 GB GPU, torch": gpu(80, runs=("llamacpp", "torch")),
    "24 GB ROCm, torch only": gpu(24, "rocm", runs=("torch",)),
}

#: (machine, model) -> (quant, device, drafter kind or None for lookup), None = refused. The numbers behind it: sizes at
#: bits per weight (quants.py), KV of 4096 tokens, 512 rows of logits on a GPU, 512 MiB kept free.
TABLE: dict[tuple[str, str], tuple[str, str, str | None] | None] = {
    # 14.8B: Q3 is not listed, 9.0 GB at Q4_K_M: 8 GB holds more than half of the layers, 12 GB all with the 0.5B drafter
    ("8 GB GPU", "qwen2.5-14b"): ("Q4_K_M", "CUDA0", "small"),
    ("12 GB GPU", "qwen2.5-14b"): ("Q4_K_M", "CUDA0", "small"),
    ("16 GB GPU", "qwen2.5-14b"): ("Q6_K", "CUDA0", "small"),
    ("24 GB GPU", "qwen2.5-14b"): ("Q8_0", "CUDA0", "small"),
    ("48 GB GPU", "qwen2.5-14b"): ("Q8_0", "CUDA0", "small"),
    ("80 GB GPU", "qwen2.5-14b"): ("Q8_0", "CUDA0", "small"),
    ("16 GB ROCm", "qwen2.5-14b"): ("Q6_K", "ROCm0", "small"),
    ("16 GB Mac", "qwen2.5-14b"): ("Q4_K_M", "Metal", "small"),
    ("64 GB Mac", "qwen2.5-14b"): ("Q8_0", "Metal", "small"),
    ("8 GB CPU", "qwen2.5-14b"): None,
    ("16 GB CPU", "qwen2.5-14b"): ("Q4_K_M", "cpu", "small"),
    ("64 GB CPU", "qwen2.5-14b"): ("Q4_K_M", "cpu", "small"),
    # 4.0B with its DSpark drafter of 1B, which runs as a Q8_0 copy (1.1 GB)
    ("8 GB GPU", "qwen3-4b"): ("Q8_0", "CUDA0", "dspark"),
    ("12 GB GPU", "qwen3-4b"): ("Q8_0", "CUDA0", "dspark"),
    ("8 GB CPU", "qwen3-4b"): ("Q4_K_M", "cpu", "dspark"),
    ("16 GB Mac", "qwen3-4b"): ("Q8_0", "Metal", "dspark"),
    # 8.2B with a drafter of 2B (2.1 GB)
    ("12 GB GPU", "qwen3-8b"): ("Q6_K", "CUDA0", "dspark"),
    ("16 GB GPU", "qwen3-8b"): ("Q8_0", "CUDA0", "dspark"),
    ("24 GB ROCm", "qwen3-8b"): ("Q8_0", "ROCm0", "dspark"),
    # 14.8B with a drafter of 3B (3.2 GB)
    ("12 GB GPU", "qwen3-14b"): ("Q5_K_M", "CUDA0", None),
    ("16 GB GPU", "qwen3-14b"): ("Q5_K_M", "CUDA0", "dspark"),
    ("24 GB GPU", "qwen3-14b"): ("Q8_0", "CUDA0", "dspark"),
    ("48 GB GPU", "qwen3-14b"): ("Q8_0", "CUDA0", "dspark"),
    ("64 GB Mac", "qwen3-14b"): ("Q8_0", "Metal", "dspark"),
    ("8 GB CPU", "qwen3-14b"): None,
    # 32B: 19.9 GB at Q4_K_M
    ("24 GB GPU", "qwen2.5-32b"): ("Q4_K_M", "CUDA0", "small"),
    ("80 GB GPU", "qwen2.5-32b"): ("Q8_0", "CUDA0", "small"),
    ("16 GB CPU", "qwen2.5-32b"): None,
    # its drafters have blocks of their own, which libllama has no graph for
    ("16 GB GPU", "gemma-4-12b"): ("Q8_0", "CUDA0", None),
    # full precision only, and nothing here drives torch on a GPU
    ("24 GB GPU", "minicpm5-2b"): None,
    # torch drives the GPU: full precision where the pair fits whole (8.0 + 2.0 GB; 16.4 + 4.0 GB; 29.5 + 6.0 GB)
    ("24 GB GPU, torch", "qwen3-4b"): ("BF16", "CUDA0", "dspark"),
    ("24 GB GPU, torch", "qwen3-8b"): ("BF16", "CUDA0", "dspark"),
    ("24 GB GPU, torch", "qwen3-14b"): ("Q8_0", "CUDA0", "dspark"),
    ("80 GB GPU, torch", "qwen3-14b"): ("BF16", "CUDA0", "dspark"),
    ("80 GB GPU, torch", "qwen2.5-14b"): ("BF16", "CUDA0", "small"),
    ("24 GB GPU, torch", "qwen2.5-14b"): ("Q8_0", "CUDA0", "small"),
    ("24 GB ROCm, torch only", "qwen3-4b"): ("BF16", "ROCm0", "dspark"),
}


@pytest.mark.parametrize(("machine", "model"), TABLE)
def test_the_table(machine: str, model: str) -> None:
    expected = TABLE[machine, model]
    entry = find(model)
    if expected is None:
        with pytest.raises(NotReady) as error:
            choose(entry, MACHINES[machine])
        assert error.value.hint
        return
    found = choose(entry, MACHINES[machine])
    kind = found.drafter.kind if found.drafter else None
    assert (found.quant, found.plan.device.name, kind) == expected, found.plan.line()
    assert found.plan.fits


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", sorted(load_models()))
def test_whatever_is_chosen_fits_and_nothing_better_would(machine: str, model: str) -> None:
    entry = find(model)
    try:
        found = choose(entry, MACHINES[machine])
    except NotReady as error:
        said = str(error)
        assert any(word in said for word in ("GB", "MB", "full precision only")), said
        return
    assert found.plan.fits
    needed = found.plan.on_device if found.plan.device.kind != "cpu" else found.plan.total
    assert needed <= found.plan.device.usable
    if found.plan.gpu_layers > found.plan.n_layer:  # all on the device: the best quant that does
        better = [q for q in fitting(entry, MACHINES[machine]) if q != found.quant and q not in ("BF16", "F16", "F32")]
        sizes = {q: entry.file_bytes(q) for q in better}
        for quant, n_bytes in sizes.items():
            if n_bytes > entry.file_bytes(found.quant):
                plan = choose(entry, MACHINES[machine], Wish(quant=quant)).plan
                drafted = plan.drafter is not None and plan.drafter.total > 0
                assert plan.gpu_layers <= plan.n_layer or not drafted, f"{quant} would fit whole"


#: machine -> where a small GGUF file and where a small checkpoint folder run
PLACES = {
    **{machine: ("CUDA0", "cpu") for machine in MACHINES if machine.endswith("GB GPU")},
    **{machine: ("ROCm0", "cpu") for machine in MACHINES if machine.endswith("GB ROCm")},
    **{machine: ("Metal", "cpu") for machine in MACHINES if machine.endswith("Mac")},
    **{machine: ("cpu", "cpu") for machine in MACHINES if machine.endswith("CPU")},
    **{machine: ("CUDA0", "CUDA0") for machine in MACHINES if machine.endswith("GPU, torch")},
    "24 GB ROCm, torch only": ("cpu", "ROCm0"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_files_and_folders_on_every_machine(
    machine: str, embedded_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    kinds = ("cpu", "cuda", "rocm", "metal")
    facts = [torch_devices.Facts(kind, 0, kind, 24 * GIB, 20 * GIB, (9, 0), bf16=True) for kind in kinds]
    monkeypatch.setattr(torch_devices, "detect", lambda: facts)
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    save_file({"lm_head.weight": np.zeros((20, 64), dtype=np.float32)}, tmp_path / "model.safetensors")
    for path, backend, place in zip((embedded_gguf, tmp_path), ("llamacpp", "torch"), PLACES[machine], strict=True):
        found = resolve(str(path), machine=MACHINES[machine])
        plan = plan_for(found, MACHINES[machine])
        assert (found.path, found.backend, plan.backend) == (path, backend, backend)
        assert plan.device.name == place
        assert plan.fits
        assert plan.device.kind == "cpu" or plan.gpu_layers == plan.n_layer + 1


class TestQwen25:
    """The target of the issue: no DSpark drafter is published, and the tool says so."""

    def test_the_plain_statement(self) -> None:
        found = choose(find("qwen2.5-14b"), MACHINES["24 GB GPU"])
        [note] = [note for note in found.notes if "no DSpark drafter is published" in note]
        assert "Qwen/Qwen2.5-0.5B-Instruct-GGUF and lookup" in note
        assert "dspark train qwen2.5-14b" in note
        assert "qwen3-14b has one" in note
        assert found.drafter is not None
        assert found.drafter.repository == "Qwen/Qwen2.5-0.5B-Instruct-GGUF"

    def test_asking_for_what_does_not_exist(self) -> None:
        with pytest.raises(BadInput, match=r"no dspark drafter is known for qwen2\.5-14b; known: small"):
            choose(find("qwen2.5-14b"), MACHINES["24 GB GPU"], Wish(drafter="dspark"))

    def test_models_that_have_one_say_nothing(self) -> None:
        assert not choose(find("qwen3-14b"), MACHINES["24 GB GPU"]).notes


class TestWishes:
    def chosen(self, model: str, machine: Machine, **wish: object) -> Resolution:
        return choose(find(model), machine, Wish(**wish))  # type: ignore[arg-type]

    def test_what_is_here_is_not_downloaded_again(self) -> None:
        assert self.chosen("qwen2.5-14b", MACHINES["48 GB GPU"], here=("Q4_K_M",)).quant == "Q4_K_M"
        assert self.chosen("qwen2.5-14b", MACHINES["12 GB GPU"], here=("Q8_0",)).quant == "Q4_K_M"  # it does not fit

    def test_a_quant_asked_for(self) -> None:
        assert self.chosen("qwen2.5-14b", MACHINES["48 GB GPU"], quant="Q5_K_M").quant == "Q5_K_M"
        with pytest.raises(NotReady, match=r"published as Q8_0, .*, not as IQ3_M"):
            self.chosen("qwen2.5-14b", MACHINES["48 GB GPU"], quant="IQ3_M")

    def test_torch_drives_full_precision_where_it_fits(self) -> None:
        both = gpu(24, runs=("llamacpp", "torch"))
        found = self.chosen("qwen3-4b", both)
        assert (found.backend, found.format, found.quant) == ("torch", "safetensors", "BF16")
        assert self.chosen("qwen3-14b", both).backend == "llamacpp"  # 29.5 GB do not fit in 24
        assert self.chosen("gemma-4-12b", gpu(48, runs=("torch",))).backend == "torch"
        assert self.chosen("qwen3-4b", both, backend="llamacpp").backend == "llamacpp"
        assert self.chosen("qwen3-4b", both, here=("Q8_0",)).quant == "Q8_0"

    def test_backends_by_kind(self) -> None:
        assert self.chosen("qwen3-4b", MACHINES["24 GB GPU"], backend="cpu").plan.device.kind == "cpu"
        with pytest.raises(NotReady, match=r"no metal device .* it has cuda, cpu"):
            self.chosen("qwen3-4b", MACHINES["24 GB GPU"], backend="metal")

    def test_a_machine_without_torch_says_what_to_install(self) -> None:
        found = self.chosen("qwen3-8b", cpu(64, torch=False))
        assert found.drafter is not None
        assert found.drafter.format == "gguf"
        assert any("pip install 'dspark[torch]'" in note for note in found.notes)
        assert choose(find("qwen3-14b"), cpu(64, torch=False)).drafter is None

    def test_a_drafter_runs_where_its_target_runs(self) -> None:
        """Beside GGUF: GGUF, or a checkpoint that can become one. Beside a checkpoint: a checkpoint."""
        both = gpu(80, runs=("llamacpp", "torch"))
        for entry in load_models().values():
            for backend in ("llamacpp", "torch"):
                try:
                    found = choose(entry, both, Wish(backend="llamacpp" if backend == "llamacpp" else "cuda"))
                except NotReady:
                    continue
                if found.drafter is not None and found.backend == "torch":
                    assert found.drafter.format == "safetensors", entry.name
                elif found.drafter is not None and found.drafter.format == "safetensors":
                    assert found.drafter.kind in ("dspark", "dflash"), entry.name
                    assert found.entry.family != "gemma4"

    def test_drafters_that_run_through_torch_only(self) -> None:
        found = choose(find("gemma-4-12b"), MACHINES["24 GB GPU"])
        assert found.drafter is None
        assert any("through torch beside a GGUF target: --drafter dspark asks for it" in note for note in found.notes)
        asked = choose(find("qwen3-8b"), MACHINES["24 GB GPU"], Wish(drafter="eagle3"))
        assert asked.drafter is not None
        assert asked.drafter.kind == "eagle3"
        with pytest.raises(BadInput, match=r"the eagle3 drafter of qwen3-8b cannot run here \(.*needs torch"):
            choose(find("qwen3-8b"), cpu(64, torch=False), Wish(drafter="eagle3"))
        torch = choose(find("gemma-4-12b"), gpu(48, runs=("torch",)))
        assert torch.drafter is not None
        assert torch.drafter.kind == "dspark"
        assert torch.plan.drafter is not None
        assert torch.plan.drafter.weights == 6_900_000_000

    def test_no_drafter_and_lookup(self) -> None:
        for word in ("none", "lookup"):
            assert self.chosen("qwen3-8b", MACHINES["24 GB GPU"], drafter=word).drafter is None

    def test_a_drafter_that_does_not_fit_is_left_out_and_named(self) -> None:
        entry = find("qwen3-14b")
        target_alone = choose(entry, cpu(64), Wish(drafter="none", quant="Q4_K_M")).plan.total
        tight = Machine(Device("cpu", "cpu", 16 * GIB, target_alone + 600 * 2**20 + GIB), (), True)
        found = choose(entry, tight)
        assert found.drafter is None
        assert any("does not fit beside the target" in note for note in found.notes)

    def test_a_context_that_does_not_fit_names_one_that_does(self) -> None:
        with pytest.raises(NotReady, match=r"needs .* can give") as error:
            self.chosen("qwen2.5-14b", MACHINES["12 GB GPU"], quant="Q4_K_M", backend="cuda", options=LONG)
        assert "--ctx" in str(error.value.hint)
        with pytest.raises(BadInput, match="more than the 32768 tokens"):
            self.chosen("qwen2.5-14b", MACHINES["80 GB GPU"], options=PlanOptions(ctx=40000))

    def test_shorter_context_before_a_refusal(self) -> None:
        entry = find("qwen2.5-14b")
        full = choose(entry, cpu(64), Wish(drafter="none")).plan
        tight = Machine(Device("cpu", "cpu", 16 * GIB, full.total - full.target.kv // 4 + 512 * 2**20), ())
        found = choose(entry, tight, Wish(drafter="none"))
        assert found.plan.ctx == 2048
        assert any("context 2048, as 4096 tokens do not fit" in note for note in found.notes)


# -- properties of the plan --------------------------------------------------------------------------------------------

SIZES = st.builds(
    TargetSize,
    weights=st.integers(10**8, 10**11),
    n_layer=st.integers(2, 100),
    n_embd=st.sampled_from([576, 2048, 5120]),
    n_vocab=st.sampled_from([32000, 152064]),
    kv_values=st.integers(10**3, 10**6),
    n_ff=st.sampled_from([1536, 17408]),
    n_ctx_train=st.sampled_from([2048, 32768]),
)


@given(SIZES, st.integers(2, 96), st.integers(0, 40))
def test_a_plan_never_promises_more_than_there_is(target: TargetSize, gib: int, asked: int) -> None:
    device = Device("CUDA0", "cuda", gib * GIB, gib * GIB)
    for options in (PlanOptions(), PlanOptions(gpu_layers=asked)):
        plan = make_plan(device, "llamacpp", target, None, options, host_free=64 * GIB)
        assert 0 <= plan.gpu_layers <= target.n_layer + 1
        if plan.fits:
            assert plan.on_device <= device.usable
            assert plan.on_host <= 64 * GIB
        parts = plan.target.total + (plan.drafter.total if plan.drafter else 0)
        assert abs(plan.total - parts) <= 1  # what is not on the device is in memory: nothing is lost
    more = make_plan(replace(device, free=device.free + GIB, total=device.total + GIB), "llamacpp", target)
    assert more.gpu_layers >= make_plan(device, "llamacpp", target).gpu_layers or more.ctx > plan.ctx


def test_more_of_anything_needs_more() -> None:
    target, device = find("qwen3-8b").size_at("Q8_0"), Device("cpu", "cpu", 64 * GIB, 64 * GIB)

    def total(**options: object) -> int:
        return make_plan(device, "llamacpp", target, None, PlanOptions(**options)).total  # type: ignore[arg-type]

    assert total(ctx=1024) < total(ctx=4096) < total(ctx=32768)
    assert total(ctx=4096, n_seq=4) > total(ctx=4096)
    assert total(ctx=4096, kv_type="q8_0") < total(ctx=4096, kv_type="f16") < total(ctx=4096, kv_type="f32")


def test_refusing_by_the_plan_names_the_longest_context_that_fits() -> None:
    target, device = find("qwen3-8b").size_at("Q8_0"), Device("cpu", "cpu", 16 * GIB, 12 * GIB)
    plan = make_plan(device, "llamacpp", target, None, PlanOptions(ctx=40960))
    with pytest.raises(NotReady, match=r"with 40960 tokens of context needs .* GB on cpu, .* can be used") as error:
        plan.or_refuse("qwen3-8b")
    ctx = int(str(error.value.hint).split()[1])
    assert make_plan(device, "llamacpp", target, None, PlanOptions(ctx=ctx)).fits
    assert not make_plan(device, "llamacpp", target, None, PlanOptions(ctx=ctx + 512)).fits


def test_errors_are_of_the_family() -> None:
    assert issubclass(NotReady, DsparkError)
    assert NotReady("x").exit_code == 3
