"""Facts, plan and memory of the device: what fits, what does not, what is given back."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from cuda_device import ATOL, DEVICE, ON_GPU, only_gpu, opened, torch

pytest.importorskip("transformers")

from dspark_cli.backends.base import BadInput, NotReady, Row
from dspark_cli.backends.torch.devices import capture_for, detect, kernels_for, pick
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.session import Session
from dspark_cli.kernels import dispatch
from test_torch_session import options
from tiny import N_VOCAB, tiny_checkpoint, tiny_config, tiny_model


def test_facts_are_those_of_the_device(files: Path) -> None:
    facts = pick(DEVICE, detect())
    assert facts.total >= facts.free > 0
    assert capture_for("auto", facts) == ("graph" if ON_GPU else "off")
    with opened(files / "target", capture="auto") as target:
        assert target.info.device == facts.torch_name
        assert target.info.details["chip"] == facts.name
        assert target.info.details["capture"] == ("graph" if ON_GPU else "off")
    if not ON_GPU:
        return
    assert facts.name == torch.cuda.get_device_name(facts.index)
    assert facts.total == torch.cuda.get_device_properties(facts.index).total_memory
    if facts.kind == "cuda":
        assert facts.capability == torch.cuda.get_device_capability(facts.index)
        assert facts.bf16 == (facts.capability >= (8, 0))
        if dispatch.installed() and facts.capability >= (7, 0):
            assert kernels_for("triton", facts, dispatch.installed) == "triton"
        else:
            with pytest.raises(BadInput, match="Triton"):
                kernels_for("triton", facts, dispatch.installed)


@only_gpu
def test_plan_and_doctor_see_it() -> None:
    from dspark_cli.cli import doctor
    from dspark_cli.registry.devices import driver, this_machine

    kind = pick(DEVICE, detect()).kind
    assert driver() == kind
    assert doctor.torch()["works"]
    assert doctor.torch()["problem"] is None
    here = [device for device in this_machine().accelerators if "torch" in device.runs]
    assert [device.kind for device in here] == [kind] * torch.cuda.device_count()
    assert [device.name for device in here] == doctor.torch()["devices"]
    assert all(device.total > device.usable > 0 for device in here)


@only_gpu
def test_a_context_that_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    config = tiny_config(max_position_embeddings=1 << 32)
    before = torch.cuda.memory_allocated()
    with pytest.raises(
        NotReady, match=r"with 1 x 4294967296 tokens of context needs about .* GB, .* GB can be used"
    ) as e:
        opened(tiny_checkpoint(tmp_path, tiny_model(config)), ctx=1 << 32, n_seq=1)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 3
    del e
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 20e6


@only_gpu
def test_a_pass_that_does_not_fit_is_computed_in_parts(tmp_path: Path) -> None:
    """A real limit on memory: smaller passes from then on, and the same answer."""
    said: list[str] = []
    folder = tiny_checkpoint(tmp_path, tiny_model(tiny_config(intermediate_size=32_768)))
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, size=480).tolist()
    with opened(folder, notice=said.append) as target:
        wanted = target.step([Row(0, tokens)])[0].logits
        target.drop(0)
        target._release()
        limit = (torch.cuda.memory_reserved() + 60e6) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit)
        try:
            found = target.step([Row(0, tokens)])[0].logits
            after = target.step([Row(0, [1, 2, 3])])[0].logits
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert target.length(0) == 483
    np.testing.assert_allclose(found, wanted, atol=ATOL, rtol=1e-3)
    assert np.isfinite(after).all()
    assert said
    assert said[0].startswith("out of memory in a pass of 480 tokens: passes of at most 240")
    assert all("out of memory in a pass" in line for line in said)


@only_gpu
def test_closing_gives_the_memory_back(files: Path) -> None:
    """All but cuBLAS's workspaces of two streams, the one of passes and the one of recordings, which torch keeps for good.

    They are there after the first sessions and do not grow: the least is 8 MiB (32 on Hopper), so less than that is none.
    """

    def cycle() -> int:
        with Session.open(options(files, "dspark", policy="fixed:3", device=DEVICE)) as session:
            request = session.text_request("The sea is", max_tokens=20, sampling=SamplingOptions())
            list(session.run(request))
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    cycle()
    before = cycle()
    for _ in range(3):
        after = cycle()
    assert after - before < 8 << 20
