"""`--backend`: which backend a name, a file or a folder runs on, and the line that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_cli.backends.errors import BadInput, NotReady
from dspark_cli.cli import options as o
from dspark_cli.registry import devices
from dspark_cli.registry.choose import Machine, Wish, choose
from dspark_cli.registry.models import find
from dspark_cli.registry.plan import PlanOptions
from dspark_cli.registry.reason import backend_line
from dspark_cli.registry.resolve import Resolved
from test_resolution import cpu, gpu

BOTH = ("llamacpp", "torch")


def line(model: str, machine: Machine, *, here: tuple[str, ...] = (), backend: str = "auto", **wish: object) -> str:
    wanted = Wish(here=here, backend=backend, **wish)  # type: ignore[arg-type]
    entry = find(model)
    found = choose(entry, machine, wanted)
    return backend_line(Resolved(entry.name, Path("x"), None, entry, found), found.plan, machine, wanted)


@pytest.mark.parametrize(
    ("model", "machine", "wish", "words"),
    [
        ("qwen3-4b", gpu(24, runs=BOTH), {}, r"torch on CUDA0: the full-precision pair fits \(\d+\.\d GB of"),
        ("qwen3-4b", gpu(24, "rocm", runs=BOTH), {"backend": "rocm"}, r"torch on ROCm0: --backend rocm; the full-prec"),
        (
            "qwen3-8b",
            gpu(12, runs=BOTH),
            {},
            r"llama.cpp on CUDA0: in full precision it needs 2\d\.\d GB, CUDA0 can give",
        ),
        (
            "qwen3-4b",
            gpu(24, runs=BOTH),
            {"here": ("Q8_0",)},
            r"llama.cpp on CUDA0: its checkpoint is not on this disk",
        ),
        ("qwen3-4b", gpu(24, runs=BOTH), {"backend": "llamacpp"}, r"llama.cpp on CUDA0: --backend llamacpp"),
        ("qwen3-4b", gpu(24, runs=BOTH), {"quant": "Q8_0"}, r"llama.cpp on CUDA0: --quant Q8_0 is a GGUF"),
        ("qwen3-4b", gpu(24, torch=False), {}, r"llama.cpp on CUDA0: torch is not installed"),
        ("qwen3-4b", gpu(24), {}, r"llama.cpp on CUDA0: torch has no GPU here"),
        ("qwen3-4b", cpu(32), {}, r"llama.cpp on cpu: torch has no GPU here, and a quant is faster on a CPU"),
        ("qwen3-4b", cpu(64), {"backend": "torch"}, r"torch on cpu: --backend torch; the full-precision pair fits"),
    ],
)
def test_the_line_says_which_and_why(model: str, machine: Machine, wish: dict, words: str) -> None:
    import re

    said = line(model, machine, **wish)
    assert re.match(f"backend {words}", said), said


def test_each_backend_gets_a_drafter_it_can_run() -> None:
    for backend, form in (("torch", "safetensors"), ("llamacpp", "gguf")):
        found = choose(find("qwen2.5-14b"), gpu(80, runs=BOTH), Wish(backend=backend))
        assert found.drafter is not None
        assert (found.backend, found.drafter.kind, found.drafter.format) == (backend, "small", form)


def test_a_checkpoint_that_no_drafter_serves_gives_way_to_a_gguf_that_one_does() -> None:
    entry = find("qwen2.5-14b")
    drafters = [drafter for drafter in entry.drafter if drafter.format == "gguf"]
    alone = entry.model_copy(update={"drafter": drafters})
    machine = gpu(80, runs=BOTH)
    found = choose(alone, machine)
    assert (found.backend, found.drafter and found.drafter.kind) == ("llamacpp", "small")
    said = backend_line(Resolved(entry.name, Path("x"), None, alone, found), found.plan, machine, Wish())
    assert "is a GGUF, which drafts beside a GGUF" in said
    asked = choose(alone, machine, Wish(backend="torch"))
    assert (asked.backend, asked.quant, asked.drafter) == ("torch", "BF16", None)


def test_torch_asked_for_where_it_cannot_be() -> None:
    with pytest.raises(NotReady, match="cannot run through torch: torch is not installed"):
        choose(find("qwen3-4b"), cpu(64, torch=False), Wish(backend="torch"))
    with pytest.raises(NotReady, match=r"needs|give"):
        choose(find("qwen3-14b"), cpu(16), Wish(backend="torch", options=PlanOptions(ctx=2048)))


def pair(model: Path, **changes: object) -> o.PairOptions:
    options = {
        "model": str(model),
        "drafter": "lookup",
        "policy": None,
        "backend": "auto",
        "quant": None,
        "ctx": None,
        "threads": None,
        "gpu_layers": None,
        "kv_type": "f16",
        "flash_attn": "auto",
        "offline": True,
    }
    return o.PairOptions(**{**options, **changes})  # type: ignore[arg-type]


class TestFolders:
    """A checkpoint folder, up to the plan: nothing is loaded."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("torch")
        from tiny import tiny_checkpoint

        return tiny_checkpoint(tmp_path / "model")

    def test_it_runs_through_torch(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for machine, device in ((cpu(16), "cpu"), (gpu(24, runs=BOTH), "cuda:0")):
            monkeypatch.setattr(devices, "this_machine", lambda machine=machine: machine)
            if device != "cpu":  # the plan asks torch about dtypes there
                monkeypatch.setattr("dspark_cli.registry.sizes.as_computed", lambda target, path, kind: (target, "f32"))
            options = pair(folder)
            found, plan = o.find_pair(options)
            assert (found.backend, plan.backend, plan.kv_type) == ("torch", "torch", "f32")
            assert "a checkpoint folder runs through torch" in o.why(found, plan, options)
            assert o.torch_device(plan) == device
            assert o.loading(options, found, plan).device == device

    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"backend": "llamacpp"}, BadInput, "checkpoint folder, which llama.cpp cannot open"),
            ({"backend": "cuda"}, NotReady, "no cuda device"),
            ({"backend": "tpu"}, BadInput, "unknown backend"),
            ({"gpu_layers": 3}, BadInput, "--gpu-layers is of llama.cpp"),
        ],
    )
    def test_what_it_cannot_be_asked(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, error: type[Exception], words: str
    ) -> None:
        monkeypatch.setattr(devices, "this_machine", lambda: cpu(16))
        with pytest.raises(error, match=words):
            o.find_pair(pair(folder, **changes))

    def test_without_torch_it_says_what_to_install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "this_machine", lambda: cpu(16))
        monkeypatch.setattr("dspark_cli.engine.opening.find_spec", lambda name: None)
        with pytest.raises(NotReady, match="not installed: torch, transformers, safetensors"):
            o.find_pair(pair(folder))

    def test_too_large_is_refused_with_numbers(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "this_machine", lambda: gpu(24, runs=BOTH))
        monkeypatch.setattr("dspark_cli.registry.sizes.as_computed", lambda target, path, kind: (huge(target), "bf16"))
        with pytest.raises(NotReady, match=r"needs \d+\.\d GB on .*GB can be used") as found:
            o.find_pair(pair(folder))
        assert found.value.exit_code == 3


def huge(target: object) -> object:
    from dataclasses import replace

    return replace(target, weights=10**12)  # type: ignore[type-var]
