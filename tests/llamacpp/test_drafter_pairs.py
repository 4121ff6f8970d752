"""Drafters that belong to another target are refused before a context is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from drafters import BARE

import synthetic
from dspark_cli.backends.base import DsparkError, PairMismatch
from dspark_cli.backends.llamacpp import passes
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.export import DrafterSpec
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from synthetic import N_LAYER, SPEC, Arrays


@pytest.fixture
def no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong pairs must be refused before a context is made."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a context was created for a drafter that does not fit")

    monkeypatch.setattr(passes, "Context", refuse)
    monkeypatch.setattr(passes, "CpuDrafter", refuse)


def write_for_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tensors: Arrays, spec: DrafterSpec, name: str
) -> Path:
    """A drafter written without the writer's own checks of the pair."""
    from dspark_cli.backends.llamacpp import export

    monkeypatch.setattr(export, "_check_target", lambda *_: synthetic.N_VOCAB)
    return synthetic.write(folder, tensors, spec, name=name)


def test_wrong_width(target: LlamaCppTarget, folder: Path, no_context: None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, hidden=288, markov_rank=32)
    path = write_for_anything(folder, monkeypatch, synthetic.random_tensors(spec), spec, "narrow.gguf")
    with pytest.raises(PairMismatch, match="hidden states of 288, the target has 576"):
        LlamaCppDrafter(path, target)


@pytest.mark.parametrize("layer", [N_LAYER - 1, N_LAYER, 90])
def test_layer_beyond_the_target(
    target: LlamaCppTarget, folder: Path, no_context: None, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    spec = replace(BARE, target_layers=(1, layer))
    path = write_for_anything(folder, monkeypatch, synthetic.random_tensors(spec), spec, "deep.gguf")
    with pytest.raises(PairMismatch, match=f"output of layer {layer}, the target has usable layers -1 to 28"):
        LlamaCppDrafter(path, target)


def rewritten(source: Path, path: Path, change: dict[str, object]) -> Path:
    """A copy of a GGUF with some metadata changed (None leaves a key out)."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = str(change.pop("general.architecture", None) or reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = change.get(field.name, field.contents())
        if value is not None:
            writer.add_key_value(field.name, value, field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens_of(path: Path) -> list[str]:
    import gguf

    return list(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())


def test_other_tokens(target: LlamaCppTarget, known: Path, folder: Path, no_context: None) -> None:
    tokens = tokens_of(known)
    tokens[777], tokens[778] = tokens[778], tokens[777]
    path = rewritten(known, folder / "other.gguf", {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(PairMismatch, match=r"token 777 is .*, in the target"):
        LlamaCppDrafter(path, target)


def test_no_mask_token(target: LlamaCppTarget, known: Path, folder: Path, no_context: None) -> None:
    path = rewritten(known, folder / "maskless.gguf", {"tokenizer.ggml.mask_token_id": None})
    with pytest.raises(PairMismatch, match="no mask token"):
        LlamaCppDrafter(path, target)


def test_other_architecture(target: LlamaCppTarget, no_context: None) -> None:
    with pytest.raises(PairMismatch, match="architecture is 'llama', not 'dflash'"):
        LlamaCppDrafter(synthetic.target_path(), target)


def test_padded_vocabulary_cannot_borrow_the_head(
    target: LlamaCppTarget, folder: Path, no_context: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's head gives 49152 numbers a row; libllama would read them as rows of 49153."""
    spec = replace(synthetic.dflash(), name="padded")
    plain = synthetic.write(folder, synthetic.random_tensors(spec), spec, name="unpadded.gguf")
    tokens = [*tokens_of(plain), "[PAD]"]
    types = [1] * len(tokens)
    path = rewritten(
        plain, folder / "padded.gguf", {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )
    with pytest.raises(PairMismatch, match=r"borrows the output head .* 49152 tokens; .* 49153"):
        LlamaCppDrafter(path, target)


def test_damaged_drafter(target: LlamaCppTarget, known: Path, folder: Path, no_context: None) -> None:
    path = folder / "cut.gguf"
    path.write_bytes(known.read_bytes()[:1_000_000])
    with pytest.raises(DsparkError, match=r"cut\.gguf has a damaged GGUF header: an array of"):
        LlamaCppDrafter(path, target)
