"""A target in three parts and its drafter on the stand-in for the Hub, in a cache of this test's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest

from dspark_cli.registry import download, hub
from dspark_cli.registry.choose import Machine
from dspark_cli.registry.disk import snapshot
from dspark_cli.registry.plan import Device
from hub_server import HubServer, Repository
from tests_support import own_registry

TARGET, DRAFT = "tester/tiny-GGUF", "tester/tiny-draft-GGUF"
MACHINE = Machine(Device("cpu", "cpu", 16 << 30, 12 << 30))
DATA = random.Random(0)
PARTS = {f"tiny-q4_k_m-{i:05d}-of-00003.gguf": DATA.randbytes(700_000 + i) for i in (1, 2, 3)}
REGISTRY = f"""
[[model]]
name = "tiny"
family = "tiny"
parameters = "1M"
context = 512
n_layer = 2
n_embd = 64
n_head_kv = 1
head_dim = 64
n_vocab = 512
gguf = "{TARGET}"
gguf_files = {{ Q4_K_M = "tiny-q4_k_m.gguf" }}
[[model.drafter]]
kind = "dspark"
format = "gguf"
repository = "{DRAFT}"
file = "tiny-draft-q8_0.gguf"
block_size = 5
"""


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The server, running, and huggingface-hub in this process told to use it. Waits are short."""
    constants = huggingface_hub.constants
    repositories = {
        TARGET: Repository({**PARTS, "tiny-q8_0.gguf": DATA.randbytes(5000), "README.md": b"small"}),
        DRAFT: Repository({"tiny-draft-q8_0.gguf": DATA.randbytes(300_000), "pytorch_model.bin": b"x" * 2000}),
    }
    own_registry(REGISTRY)
    with HubServer(repositories) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache ü"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(hub, "LONGEST_WAIT_S", 0.05)
        monkeypatch.setattr(download, "CHUNK", 16384)
        huggingface_hub.close_session()
        yield running
        huggingface_hub.close_session()


def pulled_parts() -> dict[str, bytes]:
    folder = snapshot(TARGET)
    assert folder is not None
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


def contents(server: HubServer) -> list[tuple[str, str | None]]:
    """(file, Range) of every request for content."""
    return [
        (path.rpartition("/")[2], span)
        for method, path, span in server.requests
        if method == "GET" and "/resolve/" in path
    ]
