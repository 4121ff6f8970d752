"""Drafter checkpoints: what loads, what is refused and with which words, and round trips."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dspark_cli.backends.base import DsparkError, PairMismatch  # noqa: E402
from dspark_cli.backends.torch.checkpoint import TargetTables, build, check_pair, load_drafter  # noqa: E402
from dspark_cli.backends.torch.config import BadCheckpoint, DrafterConfig  # noqa: E402
from dspark_cli.backends.torch.drafter import open_drafter  # noqa: E402
from dspark_cli.backends.torch.export import save_drafter  # noqa: E402

TINY = DrafterConfig(
    kind="dspark",
    family="qwen3",
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    draft_vocab_size=40,
    block_size=4,
    target_layer_ids=(0, 2),
    num_target_layers=4,
    mask_token_id=39,
    markov_rank=4,
    confidence_head=True,
    confidence_head_with_markov=True,
)
EAGLE = replace(
    TINY,
    kind="eagle3",
    num_layers=1,
    markov_rank=0,
    confidence_head=False,
    confidence_head_with_markov=False,
    draft_vocab_size=12,
)
FITS = {"n_vocab": 40, "n_embd": 16, "n_layer": 4}

Weights = dict[str, "torch.Tensor"]


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def random_model(config: DrafterConfig, seed: int = 0) -> torch.nn.Module:
    """A model whose every weight is random, norms included."""
    torch.manual_seed(seed)
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_drafter(random_model(TINY), tmp_path / "draft")
    return tmp_path / "draft"


def change(folder: Path, edit: Callable[[Weights], object]) -> None:
    """Rewrite the weights in `folder` after `edit`."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, markov_head_type="rnn", confidence_head_with_markov=False),
        replace(TINY, draft_vocab_size=10, sample_from_anchor=False),
        replace(TINY, family="gemma4", shared_key_value=True, activation="gelu_pytorch_tanh", embed_scale=4.0),
        EAGLE,
    ],
    ids=["vanilla", "rnn", "reduced", "gemma4", "eagle3"],
)
def test_round_trip(tmp_path: Path, config: DrafterConfig) -> None:
    model = random_model(config)
    if config.reduced:
        model.d2t = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    save_drafter(model, tmp_path)
    again = load_drafter(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(path.suffix == ".part" for path in tmp_path.iterdir())


def test_offsets_are_written_and_absolute_ids_kept(tmp_path: Path) -> None:
    model = random_model(replace(TINY, draft_vocab_size=3))
    model.d2t = torch.tensor([5, 6, 30])
    save_drafter(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["d2t"].tolist() == [5, 5, 28]
    assert load_drafter(tmp_path).d2t.tolist() == [5, 6, 30]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reports a full disk in an error of its own."""

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dspark_cli.backends.torch.export.save_file", full)
    with pytest.raises(DsparkError, match=r"draft cannot be written: .*No space left on device"):
        save_drafter(random_model(TINY), tmp_path / "draft")
    assert not list((tmp_path / "draft").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(DsparkError, match=r"file cannot be written: File exists"):
        save_drafter(random_model(TINY), tmp_path / "file")


def test_sharded_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_drafter(folder).fc.weight, weights["fc.weight"])
    index["weight_map"]["fc.weight"] = "../a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="outside its folder"):
        load_drafter(folder)


def test_matrices_left_out_come_from_the_target(tmp_path: Path) -> None:
    model = random_model(replace(TINY, draft_vocab_size=10))
    model.d2t = torch.arange(3, 33, 3)
    left_out = ("embed_tokens.weight", "lm_head.weight")
    save_drafter(model, tmp_path, without=left_out)
    with pytest.raises(BadCheckpoint, match="borrows them from the target"):
        load_drafter(tmp_path)
    tables = TargetTables(torch.randn(40, 16), torch.randn(40, 16))
    loaded = load_drafter(tmp_path, tables=tables)
    assert torch.equal(loaded.embed_tokens.weight, tables.embed_tokens)
    assert torch.equal(loaded.lm_head.weight, tables.lm_head[model.d2t])
    tied = load_drafter(tmp_path, tables=TargetTables(tables.embed_tokens))
    assert torch.equal(tied.lm_head.weight, tables.embed_tokens[model.d2t])
    with pytest.raises(BadCheckpoint, match="vocabulary does not match"):
        load_drafter(tmp_path, tables=TargetTables(torch.randn(41, 16), torch.randn(41, 16)))


def test_weights_that_only_training_needs_are_ignored(folder: Path) -> None:
    change(folder, lambda weights: weights.update({"verifier_norm.weight": torch.ones(16), "t2d": torch.ones(40)}))
    load_drafter(folder)


BAD_WEIGHTS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "missing key": (lambda w: w.pop("fc.weight"), r"missing keys: fc\.weight"),
    "extra key": (lambda w: w.update({"fc.bias": torch.ones(16)}), r"unknown keys: fc\.bias"),
    "both": (lambda w: w.update({"fc2.weight": w.pop("fc.weight")}), r"missing keys: fc\.weight; unknown keys: fc2"),
    "NaN norm": (lambda w: w["norm.weight"].fill_(float("nan")), r"NaN or infinite values in norm\.weight"),
    "infinite": (lambda w: w["fc.weight"][0, 0].fill_(float("inf")), r"NaN or infinite values in fc\.weight"),
    "untrained": (lambda w: w["hidden_norm.weight"].fill_(1.0), r"all ones, as before training: hidden_norm\.weight"),
    "shape": (lambda w: w.update({"fc.weight": torch.ones(16, 48)}), r"fc\.weight has shape \(16, 48\)"),
    "vocabulary": (lambda w: w.update({"lm_head.weight": torch.ones(41, 16)}), "vocabulary does not match"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_say_why(folder: Path, name: str) -> None:
    edit, message = BAD_WEIGHTS[name]
    change(folder, edit)
    with pytest.raises(BadCheckpoint, match=message):
        load_drafter(folder)


def test_many_missing_keys_are_counted(folder: Path) -> None:
    change(folder, lambda weights: [weights.pop(key) for key in sorted(weights) if key.startswith("layers.1")])
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.\S+ and \d+ more"):
        load_drafter(folder)


def test_untrained_models_load_when_asked_for(folder: Path) -> None:
    change(folder, lambda weights: weights["norm.weight"].fill_(1.0))
    load_drafter(folder, untrained=True)


@pytest.mark.parametrize("d2t", [[0, 0, -1], [38, 38, 38], [0.0, 1.0, 2.0], [0, 1]])
def test_bad_maps_are_refused(tmp_path: Path, d2t: list[float]) -> None:
    save_drafter(random_model(replace(TINY, draft_vocab_size=3)), tmp_path)
    change(tmp_path, lambda weights: weights.update(d2t=torch.tensor(d2t)))
    with pytest.raises(BadCheckpoint, match="d2t"):
        load_drafter(tmp_path)


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="cannot be read") as error:
        load_drafter(folder)
    assert error.value.hint


def test_pickles_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(BadCheckpoint, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load_drafter(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(DsparkError, match=r"no model\.safetensors"):
        load_drafter(folder)


def test_a_fitting_pair(folder: Path) -> None:
    drafter = open_drafter(folder, **FITS)
    assert (drafter.kind, drafter.block_size, drafter.feature_layers) == ("dspark", 4, (0, 2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_vocab": 44}, "vocabulary of 40 tokens, the target has 44"),
        ({"n_embd": 32}, "hidden states of 16, the target has 32"),
        ({"n_layer": 2}, "output of layer 2, the target has usable layers -1 to 1"),
        ({"n_layer": 5}, "for a target of 4 layers, this one has 5"),
    ],
)
def test_pairs_that_do_not_fit(folder: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(PairMismatch, match=message):
        open_drafter(folder, **(FITS | sizes))


def test_padded_vocabularies_fit_when_the_tokens_agree() -> None:
    check_pair(TINY, n_vocab=44, n_embd=16, n_layer=4, same_tokens=True)
