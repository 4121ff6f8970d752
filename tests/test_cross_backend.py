"""One set of weights in both backends: logits and features agree at every position, within the rounding of float32.

llama.cpp runs a file in F32 with float32 keys, values and attention; torch runs the same file dequantized. They differ in the
order of sums only. (llama.cpp's F16 keys and values, or its flash attention on a CPU, round to 11 bits: a hundred times more.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_cli.backends.base import DsparkError, Row, RowOutput, Target
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.torch.gguf_target import open_gguf
from dspark_cli.backends.torch.target import TorchOptions, open_target
from dspark_cli.bench.formats import requantize
from tiny import tiny_checkpoint, tiny_gguf

#: largest difference of a logit, in logits of size up to 30; and of a feature, as a share of the vector's length
LOGITS, FEATURES = 1e-3, 5e-5
CTX = 512


def llamacpp(path: Path) -> LlamaCppTarget:
    return LlamaCppTarget(path, ContextOptions(ctx=CTX, kv_type="f32", flash_attn="off"))


def outputs(target: Target, tokens: list[int], layers: tuple[int, ...]) -> RowOutput:
    """All logits and features of `tokens` in one pass, copied."""
    target.request_features(layers)
    found = target.step([Row(0, tokens)])[0]
    assert found.features is not None
    return RowOutput(found.logits.copy(), found.features.copy())


def assert_agree(mine: RowOutput, theirs: RowOutput, n_layers: int) -> None:
    np.testing.assert_allclose(mine.logits, theirs.logits, atol=LOGITS)
    assert mine.features is not None
    assert theirs.features is not None
    for a, b in zip(np.split(mine.features, n_layers, 1), np.split(theirs.features, n_layers, 1), strict=True):
        apart = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
        assert apart.max() < FEATURES


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_checkpoint(folder / "checkpoint"), tiny_gguf(folder / "tiny.gguf")


def test_a_checkpoint_and_its_gguf_agree(tiny_files: tuple[Path, Path]) -> None:
    """Three readings of the same weights: transformers' own, the GGUF in torch, the GGUF in llama.cpp."""
    checkpoint, gguf = tiny_files
    tokens = np.random.default_rng(0).integers(0, 256, size=300).tolist()
    layers = (-1, 0, 2, 3)
    with (
        open_target(checkpoint, TorchOptions(capture="off")) as own,
        open_gguf(gguf, TorchOptions(capture="off")) as read,
    ):
        whole, translated = outputs(own, tokens, layers), outputs(read, tokens, layers)
        np.testing.assert_array_equal(translated.logits, whole.logits)
        text = "naïve 😀 <|im_end|>"
        assert own.tokenizer.encode(text) == read.tokenizer.encode(text)
        assert own.tokenizer.eog_ids <= read.tokenizer.eog_ids
        message = [{"role": "user", "content": "Hi"}]
        assert own.render_chat(message) == read.render_chat(message)
    with llamacpp(gguf) as target:
        assert_agree(outputs(target, tokens, layers), whole, len(layers))


@pytest.fixture(scope="module")
def embedded_f32(embedded_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = requantize(embedded_gguf, "F32", tmp_path_factory.mktemp("f32"))
    yield path
    path.unlink()


@pytest.mark.slow
def test_the_embedded_model_agrees_in_both_backends(embedded_gguf: Path, embedded_f32: Path) -> None:
    """Every position of a long prompt; torch reads the quantized file itself, llama.cpp its F32 version."""
    layers = (-1, 0, 14, 27, 28)
    with llamacpp(embedded_f32) as target:
        text = "The sea was calm, and 17 ships lay in the harbour; def f(x): return x ** 2  # naïve\n" * 14
        tokens = target.tokenizer.encode(text)[:320]
        theirs = outputs(target, tokens, layers)
    with open_gguf(embedded_gguf, TorchOptions(ctx=CTX, capture="off")) as target:
        mine = outputs(target, tokens, layers)
    assert len(mine.logits) == 320
    assert_agree(mine, theirs, len(layers))
    assert (mine.logits.argmax(1) == theirs.logits.argmax(1)).all()


def test_what_is_not_translated_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DsparkError, match=r"architecture 'mamba'"):
        open_gguf(tmp_path / "other.gguf")
