"""The wheel in an empty environment: what a user gets, without this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE_HOME = os.environ.get("XDG_CACHE_HOME")  # before a fixture gives every test its own: pip's cache is the user's

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    own = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    env = own if CACHE_HOME is None else own | {"XDG_CACHE_HOME": CACHE_HOME}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_installs_and_answers_from_another_directory(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    wheel = next((tmp_path / "dist").glob("dspark-*.whl"))
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # llama-cpp-python comes as a wheel from pip's cache: the environment of this test run was built the same way.
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[embedded]", cwd=tmp_path)
    dspark = tmp_path / "env" / "bin" / "dspark"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(dspark, "--version", cwd=elsewhere).startswith("dspark ")
    assert "qwen2.5-14b" in run(dspark, "models", cwd=elsewhere)
    answer = json.loads(run(dspark, "generate", "smollm2-135m", "Hello", "--max-tokens", "8", "--json", cwd=elsewhere))
    assert answer["tokens"] >= 1
    top_level = {p.name for p in python.parents[1].glob("lib/python*/site-packages/*")}
    assert not top_level & {"kernels", "backends", "models.toml"}, "only the one package may be installed"
