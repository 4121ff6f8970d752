"""What is the torch target's own: dtypes, tables for drafters, several devices' words, compared passes at load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_cli.backends.base import Row  # noqa: E402
from dspark_cli.backends.torch.drafter import open_drafter  # noqa: E402
from dspark_cli.backends.torch.folder import check_folder  # noqa: E402
from dspark_cli.backends.torch.target import TorchOptions, open_target  # noqa: E402
from dspark_cli.engine.decode import Engine  # noqa: E402
from dspark_cli.engine.rounds import Request  # noqa: E402
from dspark_cli.engine.schedule import Fixed, Off  # noqa: E402
from dspark_cli.registry.plan import TargetSize  # noqa: E402
from dspark_cli.registry.sizes import as_computed, target_size  # noqa: E402
from tiny import HIDDEN, N_LAYER, N_VOCAB, tiny_checkpoint, tiny_config, tiny_drafter, tiny_model  # noqa: E402


def stored(folder: Path, dtype: torch.dtype) -> Path:
    return tiny_checkpoint(folder / str(dtype).removeprefix("torch."), tiny_model().to(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(tmp_path: Path, dtype: str) -> None:
    """bfloat16 holds 8 bits, float16 11: logits of size 1 to 10 move by some hundredths, the text mostly stays."""
    tokens = np.random.default_rng(0).integers(0, N_VOCAB, size=30).tolist()
    with open_target(stored(tmp_path, torch.float32), TorchOptions(threads=1)) as full:
        wanted = full.step([Row(0, tokens)])[0].logits
    folder = stored(tmp_path, getattr(torch, dtype))
    assert check_folder(folder).dtype == dtype
    with open_target(folder, TorchOptions(threads=1, dtype=dtype)) as half:
        assert half.info.format == {"bfloat16": "BF16", "float16": "F16"}[dtype]
        half.request_features((0, 2))
        found = half.step([Row(0, tokens)])[0]
    assert found.logits.dtype == np.float32
    assert found.features is not None
    assert found.features.dtype == np.float32
    apart = np.linalg.norm(found.logits - wanted) / np.linalg.norm(wanted)
    assert 0 < apart < 0.1


def test_a_bfloat16_pair_decodes(tmp_path: Path) -> None:
    """Greedy text in bfloat16 may differ between widths where two logits are nearly equal; nowhere else."""
    folder = stored(tmp_path, torch.bfloat16)
    with open_target(folder, TorchOptions(threads=1, dtype="bfloat16")) as target:
        drafter = open_drafter(
            tiny_drafter(tmp_path / "drafter"),
            n_vocab=N_VOCAB,
            n_embd=HIDDEN,
            n_layer=N_LAYER,
            dtype=torch.bfloat16,
        )
        request = Request(target.tokenizer.encode("one two three"), 30)
        engine = Engine(target, None, Off(), margins=True)
        rounds = list(engine.run([request]))
        plain = [t for r in rounds for t in r.tokens]
        margins = [m for r in rounds for m in r.margins or ()]
        target.drop(0)
        drafted = [t for r in Engine(target, drafter, Fixed(4)).run([request]) for t in r.tokens]
    first = next((i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b), None)
    assert first is None or margins[first] < 0.2


def test_tables_for_drafters(tmp_path: Path) -> None:
    with open_target(tiny_checkpoint(tmp_path / "own"), TorchOptions(threads=1)) as target:
        assert target.tables.embed_tokens.shape == (N_VOCAB, HIDDEN)
        assert target.tables.lm_head is not None
        assert not torch.equal(target.tables.lm_head, target.tables.embed_tokens)
    tied = tiny_model(tiny_config(tie_word_embeddings=True))
    with open_target(tiny_checkpoint(tmp_path / "tied", tied), TorchOptions(threads=1)) as target:
        assert target.tables.lm_head is None


def test_the_plan_counts_what_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 files on a CPU without bfloat16 take twice their bytes."""
    from dspark_cli.backends.torch import devices
    from test_torch_devices import MACHINES

    size = TargetSize(weights=1000, n_layer=5, n_embd=64, n_vocab=260, kv_values=320)
    real = devices.detect
    for machine, kind, stored_as, wanted in (
        ("cpu", "cpu", torch.bfloat16, (2000, "f32")),
        ("cpu", "cpu", torch.float32, (1000, "f32")),
        ("ampere", "cuda", torch.bfloat16, (1000, "bf16")),
        ("turing", "cuda", torch.bfloat16, (1000, "f16")),
    ):
        monkeypatch.setattr(devices, "detect", lambda machine=machine: real(MACHINES[machine]))
        folder = stored(tmp_path / machine, stored_as)
        planned, kv_type = as_computed(size, folder, kind)
        assert (planned.weights, kv_type) == wanted
        # what the files hold counts, not what config.json says of them
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "bfloat16"}))
        assert as_computed(size, folder, kind) == (planned, kv_type)


def test_the_same_weights_twice_are_counted_once(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    before = target_size(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert target_size(folder) == before
