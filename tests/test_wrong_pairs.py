"""Wrong and broken pairs: each is refused with its reason, and before weights are loaded or a context is made."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import synthetic
from dspark_cli.backends.base import DsparkError, PairMismatch
from dspark_cli.backends.llamacpp import drafter as drafter_module
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.pairing import TargetFacts, cautions, check_published, findings, gguf_drafter, gguf_target

Edit = Callable[[bytearray, Path], None]
LARGE = 48 << 20  # bytes of Python and numpy memory that no check of a header may need


@pytest.fixture(scope="module")
def target() -> Iterator[LlamaCppTarget]:
    with LlamaCppTarget(synthetic.target_path(), ContextOptions(ctx=256)) as opened:
        yield opened


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that fits the embedded target."""
    folder = tmp_path_factory.mktemp("pairs")
    return synthetic.write(folder, synthetic.random_tensors(), quant="F16", name="sound.gguf")


# -- damage done in place ----------------------------------------------------------------------------------------------


def key(name: str, form: str, value: Any) -> Edit:
    """Another value for a scalar metadata key."""

    def edit(data: bytearray, path: Path) -> None:
        at = data.index(name.encode()) + len(name) + 4
        struct.pack_into("<" + form, data, at, value)

    return edit


def key_of(name: str, value: bytes) -> Edit:
    """Another string of the same length for a metadata key."""

    def edit(data: bytearray, path: Path) -> None:
        at = data.index(name.encode()) + len(name) + 4 + 8
        data[at : at + len(value)] = value

    return edit


def array(name: str, values: list[int]) -> Edit:
    """Other values for an int32 array of the same length."""

    def edit(data: bytearray, path: Path) -> None:
        at = data.index(name.encode()) + len(name) + 4 + 4 + 8
        struct.pack_into(f"<{len(values)}i", data, at, *values)

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(data: bytearray, path: Path) -> None:
        assert len(old) == len(new)
        at = data.rindex(old.encode())
        data[at : at + len(old)] = new.encode()

    return edit


def tensor(name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> Edit:
    """Change the stored values of a tensor."""

    def edit(data: bytearray, path: Path) -> None:
        info = read_header(path).tensors[name]
        kind = np.float32 if info.kind == 0 else np.float16
        change(np.frombuffer(data, dtype=kind, count=int(np.prod(info.shape)), offset=info.offset))

    return edit


def shape(name: str, dimensions: tuple[int, ...]) -> Edit:
    """Other dimensions for a tensor (as the file has them: columns first)."""

    def edit(data: bytearray, path: Path) -> None:
        at = data.rindex(name.encode()) + len(name) + 4
        struct.pack_into(f"<{len(dimensions)}Q", data, at, *dimensions)

    return edit


def at(offset: int, form: str, value: int) -> Edit:
    def edit(data: bytearray, path: Path) -> None:
        struct.pack_into("<" + form, data, offset, value)

    return edit


def cut(size: int) -> Edit:
    def edit(data: bytearray, path: Path) -> None:
        del data[size:]

    return edit


def set_to(value: float, where: int | slice = slice(None)) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[where] = value

    return change


WRONG: dict[str, tuple[Edit, str]] = {
    "wrong width": (key("dflash.embedding_length", "I", 512), "hidden states of 512, the target has 576"),
    "layer ids shifted by one": (
        array("dflash.target_layers", [2, 15, 30]),
        "output of layer 29, the target has usable",
    ),
    "layer ids of a deeper model": (array("dflash.target_layers", [2, 20, 60]), "output of layer 59"),
    "a layer below the embeddings": (array("dflash.target_layers", [-1, 15, 28]), "output of layer -2"),
    "a layer read twice": (array("dflash.target_layers", [2, 15, 15]), "reads a layer twice"),
    "another architecture": (key_of("general.architecture", b"dflush"), "its architecture is 'dflush', not 'dflash'"),
    "a block that drafts nothing": (
        lambda d, p: (key("dflash.block_size", "I", 1)(d, p), key("dflash.sample_from_anchor", "?", False)(d, p))[0],
        "a block of 1 rows drafts nothing",
    ),
    "an absurd block": (key("dflash.block_size", "I", 4096), "a block of 4096 rows"),
    "a mask token outside": (key("tokenizer.ggml.mask_token_id", "I", 50000), "mask token 50000 is outside"),
    "a RoPE base of zero": (key("dflash.rope.freq_base", "f", 0.0), "a RoPE base of 0.0"),
    "a RoPE base that is NaN": (key("dflash.rope.freq_base", "f", float("nan")), "a RoPE base of nan"),
    "RoPE over more than a head": (key("dflash.rope.dimension_count", "I", 64), "RoPE over 64 of 32 dimensions"),
    "a confidence head that is not there": (
        renamed("conf_proj.weight", "conf_gone.weight"),
        "disagree about a confidence",
    ),
    "a missing tensor": (renamed("blk.1.ffn_up.weight", "blk.1.ffn_xx.weight"), r"blk\.1\.ffn_up\.weight is missing"),
    "more layers than tensors": (key("dflash.block_count", "I", 3), r"blk\.2\.attn_norm\.weight is missing"),
    "no layers": (key("dflash.block_count", "I", 0), "no layers"),
    "features of another number of layers": (
        shape("fc.weight", (576 * 2, 576)),
        "fc.weight is 576x1152, needs 576x1728",
    ),
    "NaN in a norm": (tensor("blk.0.attn_norm.weight", set_to(float("nan"), 5)), r"NaN .* in blk\.0\.attn_norm"),
    "infinity in a matrix": (
        tensor("markov_w2.weight", set_to(float("inf"), slice(64))),
        "NaN or infinite .* markov_w2",
    ),
    "norms of ones": (tensor("output_norm.weight", set_to(1.0)), "all ones, as before training: output_norm"),
    "cut in its header": (cut(1_000_000), "damaged GGUF header"),
    "cut in its tensors": (cut(9_000_000), r"damaged GGUF header: tensor .* the file has 9000000"),
    "a tensor of exabytes": (shape("fc.weight", (2**40, 2**20)), "damaged GGUF header: tensor fc.weight"),
    "a negative size in disguise": (shape("fc.weight", (2**64 - 1, 576)), "damaged GGUF header"),
    "billions of tensors": (at(8, "Q", 2**60), "damaged GGUF header: 1152921504606846976 tensors"),
    "billions of values": (at(16, "Q", 2**60), "damaged GGUF header"),
    "a key of exabytes": (at(24, "Q", 2**62), "damaged GGUF header: a string of"),
    "no GGUF at all": (at(0, "I", 0x04034B50), "is not a GGUF file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_anything_is_loaded(
    name: str, target: LlamaCppTarget, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, reason = WRONG[name]
    data = bytearray(sound.read_bytes())
    edit(data, sound)
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(data)
    del data

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded for a pair that does not fit")

    monkeypatch.setattr(drafter_module, "Model", loads)
    tracemalloc.start()
    try:
        with pytest.raises(DsparkError, match=reason) as error:
            LlamaCppDrafter(path, target)
        assert tracemalloc.get_traced_memory()[1] < LARGE
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_the_sound_one_passes_every_check(target: LlamaCppTarget, sound: Path) -> None:
    facts = gguf_target(read_header(synthetic.target_path()), "target")
    found = list(findings(gguf_drafter(read_header(sound), sound, facts), facts))
    assert [finding.problem for finding in found] == [None] * len(found)
    assert {"hidden size", "target layers", "vocabulary", "block", "mask token", "rope", "head"} <= {
        f.name for f in found
    }
    LlamaCppDrafter(sound, target).close()


def test_another_tokenizer_of_the_same_size(target: LlamaCppTarget, sound: Path, tmp_path: Path) -> None:
    """Texts are compared once both vocabularies are there, still before a context is made."""
    data = bytearray(sound.read_bytes())
    old = "Ġquickly".encode()
    where = data.index(old)
    data[where : where + len(old)] = "Ġquickle".encode()
    path = tmp_path / "other tokenizer.gguf"
    path.write_bytes(data)
    with pytest.raises(PairMismatch, match=r"token \d+ is b'.*quickle', in the target b'.*quickly'"):
        LlamaCppDrafter(path, target)


def test_a_block_that_counts_the_anchor_on_one_side_only(sound: Path) -> None:
    facts = gguf_target(read_header(synthetic.target_path()), "target")
    drafter = gguf_drafter(read_header(sound), sound, facts)
    check_published(drafter, 5)
    check_published(drafter, None)
    with pytest.raises(PairMismatch, match="drafts 5 tokens a round, its card says 4: one of them counts the anchor"):
        check_published(drafter, 4)


@pytest.mark.parametrize(
    ("trained", "asked", "warns"),
    [("off", True, True), ("on", False, True), ("off", False, False), ("both", True, False), (None, True, False)],
)
def test_thinking_mode_against_the_drafters_training(trained: str | None, asked: bool, warns: bool) -> None:
    facts = TargetFacts("t", 10, 8, 4, 2)
    found = cautions(facts, trained_thinking=trained, thinking=asked)
    assert bool(found) == warns
    assert not warns or ("--no-thinking" if asked else "--thinking") in found[0]


@pytest.mark.parametrize(
    ("trained", "flag"), [("off", "--no-thinking"), ("on", "--thinking"), ("both", None), (None, None)]
)
def test_a_chat_that_leaves_thinking_to_the_template(trained: str | None, flag: str | None) -> None:
    facts = TargetFacts("t", 10, 8, 4, 2)
    said = cautions(facts, trained_thinking=trained, switch=True)
    assert bool(said) == (flag is not None)
    assert flag is None or f"template: {flag} makes sure of it" in said[0]
    assert cautions(facts, trained_thinking=trained) == []


def test_a_target_without_a_chat_template() -> None:
    facts = TargetFacts("t", 10, 8, 4, 2, has_template=False)
    assert "no chat template" in cautions(facts)[0]
    assert cautions(facts, chat=False) == []


# -- checkpoints -------------------------------------------------------------------------------------------------------


class TestCheckpoints:
    """The same for safetensors folders: sizes and links are checked before a weight is read."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("torch", reason="torch is not installed")
        from dspark_cli.backends.torch.export import save_drafter
        from test_torch_checkpoint import TINY, random_model

        save_drafter(random_model(TINY), tmp_path / "draft")
        return tmp_path / "draft"

    def refused(self, folder: Path, reason: str, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
        from dspark_cli.backends.torch import checkpoint
        from dspark_cli.backends.torch.drafter import open_drafter

        def reads(*_: object) -> None:
            raise AssertionError("weights were read for a pair that does not fit")

        monkeypatch.setattr(checkpoint, "read_weights", reads)
        with pytest.raises(DsparkError, match=reason):
            open_drafter(folder, **({"n_vocab": 40, "n_embd": 16, "n_layer": 4} | sizes))

    @pytest.mark.parametrize(
        ("sizes", "reason"),
        [
            ({"n_embd": 32}, "hidden states of 16, the target has 32"),
            ({"n_vocab": 44}, "vocabulary of 40 tokens, the target has 44"),
            ({"n_layer": 2}, "output of layer 2"),
            ({"n_layer": 5}, "for a target of 4 layers, this one has 5"),
        ],
    )
    def test_sizes(self, folder: Path, sizes: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused(folder, reason, monkeypatch, **sizes)

    def test_a_link_out_of_the_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        elsewhere = folder.parent / "elsewhere.safetensors"
        shutil.move(folder / "model.safetensors", elsewhere)
        (folder / "model.safetensors").symlink_to(elsewhere)
        self.refused(folder, "is a link out of its folder", monkeypatch)

    def test_links_of_the_hubs_cache_are_no_way_out(self, folder: Path) -> None:
        from dspark_cli.backends.torch.checkpoint import load_drafter

        root = folder.parent / "models--a--b"
        snapshot = root / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.move(folder / name, root / "blobs" / name)
            (snapshot / name).symlink_to(Path("../../blobs") / name)
        assert load_drafter(snapshot).config.kind == "dspark"

    def test_pickles(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refused(folder, "pickled weights only", monkeypatch)

    def test_an_index_that_names_files_elsewhere(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"fc.weight": "../../etc/passwd"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, "names files outside its folder", monkeypatch)

    def test_a_tensor_of_another_size(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "intermediate_size": 10**9}))
        self.refused(folder, r"has shape \(.*24.*\), config.json of .* says", monkeypatch)

    def test_an_absurd_header(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        struct.pack_into("<Q", data, 0, 2**62)
        (folder / "model.safetensors").write_bytes(data)
        self.refused(folder, "cannot be read", monkeypatch)
