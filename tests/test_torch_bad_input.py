"""Checkpoints that must not or cannot be loaded, and memory that runs out: which words, which exit code."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from dspark_cli.backends.base import BadInput, DsparkError, NotReady, Row  # noqa: E402
from dspark_cli.backends.lookup import LookupDrafter  # noqa: E402
from dspark_cli.backends.torch import checkpoint, loading  # noqa: E402
from dspark_cli.backends.torch import target as module  # noqa: E402
from dspark_cli.backends.torch.drafter import open_drafter  # noqa: E402
from dspark_cli.backends.torch.network import Network  # noqa: E402
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget, open_target  # noqa: E402
from dspark_cli.engine.decode import Engine  # noqa: E402
from dspark_cli.engine.rounds import Request  # noqa: E402
from dspark_cli.engine.schedule import Fixed, Off  # noqa: E402
from tiny import END, HIDDEN, N_LAYER, N_VOCAB, tiny_checkpoint, tiny_drafter, tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path, **options: object) -> TorchTarget:
    return open_target(folder, TorchOptions(threads=1, **{"capture": "off", **options}))  # type: ignore[arg-type]


def edit(folder: Path, change: Callable[[dict], object], name: str = "config.json") -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path, n_bytes: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:n_bytes])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pickled_under_a_safe_name(folder: Path) -> None:
    torch.save({"lm_head.weight": torch.ones(2)}, folder / "model.safetensors")


def index(folder: Path, weight_map: object) -> None:
    """The weights by an index instead of by their usual name."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def retable(folder: Path, change: Callable[[dict], object]) -> None:
    """Another table in front of the same values."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    change(table)
    head = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


def own_tokenizer(folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').close()")
    words = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    edit(folder, lambda c: c.update(words), "tokenizer_config.json")


HEAD, QUERY = "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"

#: what is done to the folder, words of the refusal
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"is no checkpoint: it has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"not a JSON object"),
    "code of its own": (
        lambda f: edit(f, lambda c: c.update(model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"})),
        r"needs code that comes with it \(auto_map: AutoModelForCausalLM\).*never runs code",
    ),
    "code of its own, in other words": (
        lambda f: edit(f, lambda c: c.update(model_type="own", auto_map="own.Model")),
        r"needs code that comes with it \(auto_map: own.Model\)",
    ),
    "a tokenizer of its own": (own_tokenizer, r"the tokenizer of .* needs code that comes with it.*never runs code"),
    "quantized in other words": (
        lambda f: edit(f, lambda c: c.update(quantization_config="awq")),
        r"quantized by an unknown method",
    ),
    "quantized": (
        lambda f: edit(f, lambda c: c.update(quantization_config={"quant_method": "awq"})),
        r"quantized by awq: .*float32, bfloat16 and float16",
    ),
    "pickled": (pickled, r"pickled weights only \(pytorch_model.bin\).*could run code"),
    "pickled under a safe name": (pickled_under_a_safe_name, r"cannot be read as safetensors"),
    "an index of nothing": (lambda f: index(f, {}), r"names no weight files"),
    "an index that is none": (lambda f: index(f, {"a": 1}), r"index.json cannot be read"),
    "an index out of the folder": (lambda f: index(f, {"a": "../a.safetensors"}), r"names files outside its folder"),
    "an index of what is not here": (lambda f: index(f, {"a": "b.safetensors"}), r"lacks 1 of 1 weight files: b.safe"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model.safetensors"),
    "cut short": (lambda f: cut(f, 50_000), r"has 50000 bytes, its table needs \d+"),
    "cut in its table": (lambda f: cut(f, 100), r"cannot be read"),
    "empty": (lambda f: cut(f, 0), r"cannot be read"),
    "a table without dtypes": (lambda f: retable(f, lambda t: t[QUERY].pop("dtype")), r"cannot be read as safetensors"),
    "a table without shapes": (lambda f: retable(f, lambda t: t[QUERY].pop("shape")), r"cannot be read as safetensors"),
    "a table of other shapes": (lambda f: retable(f, lambda t: t[QUERY].update(shape=[1, 2])), r"cannot be loaded"),
    "integers as a weight": (
        lambda f: rewrite(f, lambda w: w.update({QUERY: w[QUERY].to(torch.uint8)})),
        r"q_proj.weight is U8; .*F32, BF16, F16",
    ),
    "float64": (
        lambda f: rewrite(f, lambda w: w.update({HEAD: w[HEAD].double()})),
        r"lm_head.weight is F64; .*F32, BF16",
    ),
    "float8": (
        lambda f: rewrite(f, lambda w: w.update({HEAD: w[HEAD].to(torch.float8_e4m3fn)})),
        r"lm_head.weight is F8_E4M3",
    ),
    "a weight is missing": (lambda f: rewrite(f, lambda w: w.pop(QUERY)), r"lacks weights: .*q_proj.weight"),
    "a weight has another shape": (
        lambda f: rewrite(f, lambda w: w.update({QUERY: w[QUERY][:32].clone()})),
        r"q_proj.weight has (shape \(32, 64\), config.json says \(64, 64\)|another shape)",
    ),
    "a weight is NaN": (lambda f: rewrite(f, lambda w: w[HEAD].fill_(float("nan"))), r"its weights are broken"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer of .* cannot be loaded"),
    "impossible sizes": (lambda f: edit(f, lambda c: c.update(num_attention_heads=0)), r"cannot be loaded"),
    "sizes that do not divide": (lambda f: edit(f, lambda c: c.update(num_attention_heads=3)), r"cannot be loaded: "),
    "sizes below nothing": (lambda f: edit(f, lambda c: c.update(intermediate_size=-1)), r"cannot be loaded"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_be_used(folder: Path, what: str) -> None:
    damage, words = BROKEN[what]
    damage(folder)
    with pytest.raises(DsparkError, match=words):
        opened(folder)
    assert not (folder.parent / "ran").exists(), "code of the folder was run"


def test_a_model_whose_attention_cannot_be_replaced(tmp_path: Path) -> None:
    """Old code in transformers chooses its attention itself."""
    sizes = {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model(transformers.FalconConfig(**sizes))
    with pytest.raises(DsparkError, match="attention of its own, which cannot be replaced"):
        opened(tiny_checkpoint(tmp_path / "falcon", model))


def test_end_tokens_that_are_none(folder: Path) -> None:
    """The tokenizer's own end token is left."""
    (folder / "generation_config.json").write_text('{"eos_token_id": ["x", 99999, -1]}')
    with opened(folder) as target:
        assert target.tokenizer.eog_ids == {END}


def test_a_model_that_transformers_does_not_know(folder: Path) -> None:
    edit(folder, lambda config: config.update(model_type="qwen99"))
    with pytest.raises(NotReady, match=r"transformers \S+ has no language model for .*'qwen99'") as error:
        opened(folder)
    assert error.value.exit_code == 3


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(DsparkError, match=rf"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        opened(tmp_path)


def test_weights_that_are_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(DsparkError, match="link out of its folder"):
        opened(folder)


def test_a_drafter_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a drafter, not a model"):
        opened(tiny_drafter(tmp_path / "drafter"))


def test_code_in_the_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    """A model that transformers has, with code beside it: the code stays where it is."""
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    edit(folder, lambda config: config.update(auto_map={"AutoModelForCausalLM": "own.Model"}))
    opened(folder).close()
    assert not (tmp_path / "ran").exists()


def test_no_chat_template(tmp_path: Path) -> None:
    with (
        opened(tiny_checkpoint(tmp_path / "model", template=None)) as target,
        pytest.raises(DsparkError, match="no chat template"),
    ):
        target.render_chat([{"role": "user", "content": "Hi"}])


def test_a_device_that_is_not_here(good: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has that device")
    with pytest.raises(NotReady, match="no cuda device"):
        opened(good, device="cuda")


def test_a_switch_that_is_none(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="unknown capture"):
        opened(good, capture="sometimes")
    monkeypatch.setattr(module, "load_model", None)  # told before anything is loaded
    with pytest.raises(BadInput, match="cannot be captured on cpu"):
        opened(good, capture="graph", device="cpu")
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    with pytest.raises(BadInput, match="Triton does not run on cpu"):
        opened(good, device="cpu")
    with pytest.raises(BadInput, match="at least 1"):
        TorchOptions(n_seq=0)


# -- memory --------------------------------------------------------------------------------------------------------------


def no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_no_memory_for_the_weights(good: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loading.transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(NotReady, match=r"model in float32 needs about 0\.8 MB, \d+\.\d GB can be used") as found:
        opened(good)
    assert found.value.exit_code == 3


def test_no_memory_for_the_context(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KeyValues", no_memory)
    with pytest.raises(NotReady, match=r"model with 1 x 512 tokens of context needs about 1\.4 MB, \d") as found:
        opened(good)
    assert found.value.exit_code == 3


@pytest.mark.parametrize("where", ["probe", "without_cache"])
def test_no_memory_for_a_first_pass(good: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(Network, where, no_memory)
    with pytest.raises(NotReady, match=r"a first pass of model needs about \d\.\d MB, \d+\.\d GB can be used") as found:
        opened(good)
    assert found.value.exit_code == 3


@pytest.mark.parametrize("where", ["read_weights", "assemble"])
def test_no_memory_for_the_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(checkpoint, where, no_memory)
    with pytest.raises(NotReady, match=r"the drafter draft needs about 0\.\d MB, \d+\.\d GB can be used") as found:
        open_drafter(tiny_drafter(tmp_path / "draft"), n_vocab=N_VOCAB, n_embd=HIDDEN, n_layer=N_LAYER)
    assert found.value.exit_code == 3
    assert "--drafter lookup" in str(found.value.hint)


#: how an allocation fails: on CUDA and ROCm, in torch on a CPU, in numpy
FAILURES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError("Unable to allocate 20.0 GiB for an array"),
)


class ShortOfMemory:
    """A network that fails on passes of more than `most` columns."""

    def __init__(self, inner: Network, most: int, error: BaseException = FAILURES[0]) -> None:
        self.inner, self.most, self.error, self.failures = inner, most, error, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __call__(self, ids: torch.Tensor, *rest: object) -> object:
        if ids.numel() > self.most:
            self.failures += 1
            raise self.error
        return self.inner(ids, *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", FAILURES)
def test_a_pass_that_runs_out_of_memory_is_done_in_parts(good: Path, error: BaseException) -> None:
    said: list[str] = []
    tokens = list(range(40))
    with opened(good, n_seq=2, notice=said.append) as target:
        target.request_features((0, 2))
        whole = target.step([Row(0, tokens)])[0]
        target.drop(0)
        target.network = ShortOfMemory(target.network, 6, error)  # type: ignore[assignment]
        parts = target.step([Row(0, tokens, 25), Row(1, tokens[:9], 0)])
        assert [target.length(0), target.length(1)] == [40, 9]
        assert target.max_rows <= 6
    np.testing.assert_allclose(parts[0].logits, whole.logits[15:], atol=1e-3)
    np.testing.assert_allclose(parts[0].features, whole.features, atol=1e-3)
    assert parts[1].logits.shape[0] == 0
    assert all("out of memory in a pass of" in line for line in said)


def test_an_answer_survives_running_out_of_memory(good: Path) -> None:
    """Drafting shrinks to what still fits, the text stays the same."""
    with opened(good) as target:
        request = Request(target.tokenizer.encode("one two three one two three one two"), 40)
        plain = [t for r in Engine(target, None, Off()).run([request]) for t in r.tokens]
        target.drop(0)
        target.network = ShortOfMemory(target.network, 3)  # type: ignore[assignment]
        rounds = list(Engine(target, LookupDrafter(), Fixed(6)).run([request]))
        assert [t for r in rounds for t in r.tokens] == plain
        assert target.max_rows <= 3
        assert all(r.verified <= 2 for r in rounds[-5:])


@pytest.mark.parametrize("where", ["_draft", "_take"])
def test_a_drafter_that_runs_out_of_memory_is_left_out(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the middle of an answer: its text goes on, and stays that of plain decoding."""
    said: list[str] = []
    with opened(good) as target:
        drafter = open_drafter(tiny_drafter(tmp_path / "drafter"), n_vocab=N_VOCAB, n_embd=HIDDEN, n_layer=N_LAYER)
        drafter.notice = said.append
        request = Request(target.tokenizer.encode("one two three"), 30)
        plain = [t for r in Engine(target, None, Off()).run([request]) for t in r.tokens]
        target.drop(0)
        tokens: list[int] = []
        for number, item in enumerate(Engine(target, drafter, Fixed(4)).run([request])):
            tokens += item.tokens
            if number == 3:
                monkeypatch.setattr(drafter, where, no_memory)
    assert tokens == plain
    assert said == ["the drafter drafter ran out of memory: decoding goes on without it"]
    assert item.drafted == 0


def test_not_even_one_token(good: Path) -> None:
    with opened(good) as target:
        target.network = ShortOfMemory(target.network, 0)  # type: ignore[assignment]
        with pytest.raises(NotReady, match="not even one token") as error:
            target.step([Row(0, [1, 2, 3, 4, 5])])
        assert error.value.exit_code == 3


def test_other_errors_stay_what_they_are(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(good) as target:

        def broken(*_: object) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(target, "network", broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            target.step([Row(0, [1])])
