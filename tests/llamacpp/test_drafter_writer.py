"""What the writer of drafter GGUFs refuses, and that tensors come back as written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drafters import BARE, REDUCED, opened, propose

import synthetic
from dspark_cli.backends.base import BadInput, DsparkError, PairMismatch
from dspark_cli.backends.llamacpp.export import write_drafter_gguf
from dspark_cli.backends.llamacpp.header import read_tensor, tensor_infos
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from synthetic import HIDDEN, SPEC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 64}, "hidden size 64"),
        ({"target_layers": (1, 29)}, "layer 29"),
        ({"target_layers": (-2,)}, "layer -2"),
        ({"mask_token_id": 49152}, "mask token is 49152"),
    ],
)
def test_writer_refuses_another_target(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(PairMismatch, match=message):
        synthetic.write(tmp_path, {}, replace(SPEC, **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_incomplete_or_foreign_tensors(tmp_path: Path) -> None:
    tensors = synthetic.random_tensors(BARE)
    with pytest.raises(DsparkError, match=r"lacks layers\.2\.input_layernorm\.weight"):
        synthetic.write(tmp_path, tensors, replace(BARE, n_layer=3))
    with pytest.raises(DsparkError, match=r"markov_head\.gate_proj\.weight, which libllama cannot run"):
        synthetic.write(tmp_path, tensors | {"markov_head.gate_proj.weight": np.zeros((64, 640))}, BARE)
    with pytest.raises(DsparkError, match=r"fc\.weight has shape \(576, 1728\).* \(576, 1152\)"):
        synthetic.write(tmp_path, tensors, replace(BARE, target_layers=(1, 2)))
    with pytest.raises(DsparkError, match="unknown format 'Q4_K_M'"):
        synthetic.write(tmp_path, tensors, BARE, quant="Q4_K_M")
    with pytest.raises(DsparkError, match="only beside a Markov head"):
        synthetic.write(tmp_path, tensors, replace(SPEC, markov_rank=0))
    doubled = synthetic.random_tensors(REDUCED)
    doubled["d2t"][1] = doubled["d2t"][0]
    with pytest.raises(DsparkError, match="d2t must hold different ids"):
        synthetic.write(tmp_path, doubled, REDUCED)
    assert list(tmp_path.iterdir()) == []


def test_writer_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "d.gguf"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(DsparkError, match=r"d\.gguf cannot be written: No space left"):
        synthetic.write(tmp_path, synthetic.random_tensors(BARE), BARE)
    assert path.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["d.gguf"]
    with pytest.raises(DsparkError, match="cannot be written"):
        write_drafter_gguf(tmp_path / "no" / "d.gguf", synthetic.random_tensors(BARE), BARE, synthetic.target_path())


def test_tensors_come_back_as_written(reduced: Path) -> None:
    tensors, infos = synthetic.random_tensors(REDUCED), tensor_infos(reduced)
    np.testing.assert_array_equal(read_tensor(reduced, infos["d2t"]), tensors["d2t"])
    np.testing.assert_array_equal(read_tensor(reduced, infos["fc.weight"]), tensors["fc.weight"])
    np.testing.assert_array_equal(
        read_tensor(reduced, infos["blk.1.attn_k_norm.weight"]), tensors["layers.1.self_attn.k_norm.weight"]
    )
    np.testing.assert_array_equal(
        read_tensor(reduced, infos["conf_proj.weight"]), tensors["confidence_head.proj.weight"]
    )


def test_confidence_head_without_markov_part(target: LlamaCppTarget, tmp_path: Path) -> None:
    """confidence_head_with_markov false: weights for the hidden state alone; the rest is filled with zeros."""
    tensors = synthetic.known_tensors()
    tensors["confidence_head.proj.weight"] = tensors["confidence_head.proj.weight"][:, :HIDDEN]
    path = synthetic.write(tmp_path, tensors)
    assert tensor_infos(path)["conf_proj.weight"].shape == (1, HIDDEN + SPEC.markov_rank)
    with opened(path, target) as drafter:
        np.testing.assert_allclose(propose(drafter, 9).confidence, 1 / (1 + np.exp(-0.3)), atol=1e-5)


def test_a_drafter_is_no_target(known: Path) -> None:
    with pytest.raises(BadInput, match="is a drafter, not a model that can answer"):
        LlamaCppTarget(known)
