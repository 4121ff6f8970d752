"""A GGUF target in torch says what llama.cpp says: logits, features, final states; whole texts and column by column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_cli.backends.base import DsparkError, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.torch.gguf_model import Columns, load_gguf_model, untranslated
from dspark_cli.training.documents import Document
from dspark_cli.training.features import LlamaCppReader, Thoughts, TorchReader

#: f32 cache and no flash attention: what is left is the order of sums
EXACT = ContextOptions(ctx=512, kv_type="f32", flash_attn="off")


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(20, 40_000, length).tolist()


def test_logits_and_features_agree_with_llama_cpp(tiny_target: Path) -> None:
    model, ids = load_gguf_model(tiny_target), text(300)
    *features, hidden = model.read(torch.tensor([ids]), torch.tensor([300]), (-1, 0, 2))
    with LlamaCppTarget(tiny_target, EXACT) as target:
        target.request_features((-1, 0, 2))
        target.request_hidden(True)
        output = target.step([Row(0, ids)])[0]
        assert output.features is not None
        assert output.hidden is not None
        ours = torch.cat(features, dim=-1)[0].numpy()
        np.testing.assert_allclose(ours, output.features, atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(hidden[0].numpy(), output.hidden, atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(model.lm_head(hidden)[0].numpy(), output.logits, atol=5e-3, rtol=1e-3)


def test_columns_agree_with_whole_texts_wherever_they_begin(tiny_target: Path) -> None:
    """Two rows; one begins a second text in the middle, and old columns are given up on the way."""
    model = load_gguf_model(tiny_target)
    first, second, third = text(40, 1), text(25, 2), text(15, 3)
    columns = Columns(model, 2, 32)  # less than all columns together: one row restarts, then the other
    states = []
    for k in range(40):
        if k == 15:
            columns.begins[1] = columns.column
        if k == 20:
            columns.begins[0] = columns.column
        row = (first[k] if k < 20 else second[k - 20], third[k] if k < 15 else second[k - 15])
        states.append(columns.step(torch.tensor(row)))
    whole = model.read(torch.tensor([second]), torch.tensor([25]), ())[-1][0]
    torch.testing.assert_close(states[39][0], whole[19], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[39][1], whole[24], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        states[14][1], model.read(torch.tensor([third]), torch.tensor([15]), ())[-1][0, 14], atol=1e-4, rtol=1e-4
    )


def test_a_text_longer_than_the_columns_is_an_error(tiny_target: Path) -> None:
    columns = Columns(load_gguf_model(tiny_target), 1, 4)
    for _ in range(4):
        columns.step(torch.tensor([30]))
    with pytest.raises(DsparkError, match="4 tokens"):
        columns.step(torch.tensor([30]))


def test_both_readers_think_alike(tiny_target: Path) -> None:
    documents = [Document(tuple(text(n, n)), 5, 0.0) for n in (30, 7, 12)]
    layers = (0, 2)
    with LlamaCppTarget(tiny_target, EXACT) as target:
        native = list(LlamaCppReader(target).read(documents, layers))
    ours = list(TorchReader(load_gguf_model(tiny_target)).read(documents, layers))
    for mine, theirs, document in zip(ours, native, documents, strict=True):
        assert mine.features.shape == (len(document.ids), 2 * 64)
        for name in vars(Thoughts(mine.features, mine.hidden, mine.norms)):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=5e-3, rtol=1e-3)


def test_other_architectures_are_refused(tmp_path: Path, tiny_target: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_target.read_bytes().replace(b"llama", b"gemma", 1))
    with pytest.raises(DsparkError, match=r"architecture 'gemma'; torch opens GGUF files of llama, qwen3"):
        load_gguf_model(other)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight"])
def test_what_torch_would_leave_out_is_refused(tiny_target: Path, tmp_path: Path, name: str) -> None:
    """Llama 3's table of rotary factors, biases, experts: without them the features would be another model's."""
    other = tmp_path / "other.gguf"
    known = b"blk.0.ffn_gate.weight" if len(name) > 20 else b"output_norm.weight"  # another name of the same length
    written = name.encode().ljust(len(known), b"_")[: len(known)]
    data = tiny_target.read_bytes()
    assert known in data
    other.write_bytes(data.replace(known, written, 1))
    assert f"has {written.decode()}" in untranslated(other)
    with pytest.raises(DsparkError, match="which torch does not run"):
        load_gguf_model(other)
    assert untranslated(tiny_target) == ""
