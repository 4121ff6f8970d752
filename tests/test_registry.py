"""models.toml: what is in it, what is refused and where, the user's own additions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import dspark_cli.cli.models as models_command
from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.cli import app
from dspark_cli.registry import devices
from dspark_cli.registry.choose import Machine
from dspark_cli.registry.models import _load, find, load_models, registry_file
from dspark_cli.registry.plan import GIB, Device
from dspark_cli.registry.quants import BITS, part_of, parts_of, quant_of, weight_bytes, whole_name
from dspark_cli.registry.resolve import check_path, is_repository, looks_like_path, resolve
from dspark_cli.registry.schema import Entry
from tests_support import own_registry

GOOD = """[[model]]
name = "mine"
family = "f"
parameters = "4B"
gguf = "me/mine-GGUF"
"""


def test_every_published_pair_of_the_design_is_there() -> None:
    models = load_models()
    for name, x in (
        ("qwen3-4b", "qwen3_4b"),
        ("qwen3-8b", "qwen3_8b"),
        ("qwen3-14b", "qwen3_14b"),
        ("gemma-4-12b", "gemma4_12b"),
    ):
        repositories = [drafter.repository for drafter in models[name].drafter]
        assert repositories[:3] == [
            *(f"deepseek-ai/{kind}_{x}_block7" for kind in ("dspark", "dflash")),
            f"deepseek-ai/eagle3_{x}_ttt7",
        ]
    for name, repository, block in (
        ("qwen3-4b", "z-lab/Qwen3-4B-DFlash-b16", 15),
        ("lfm2.5-1.2b", "LiquidAI/LFM2.5-1.2B-Instruct-DSpark-GGUF", 9),
        ("llama-3.2-1b", "rasyosef/Llama-3.2-1B-Instruct-DSpark", 8),
        ("qwen3.8-27b", "RedHatAI/Qwen3.8-27B-speculator.dspark", 8),
        ("qwen3.6-27b", "satgeze/Qwen3.6-27B-DSpark", 15),
        ("deepseek-v4-flash", "am17an/DeepseekV4-Flash-20260731-DSpark.gguf", 5),
    ):
        [drafter] = [d for d in models[name].drafter if d.repository == repository]
        assert drafter.block_size == block
    assert {d.kind for d in models["qwen2.5-14b"].drafter} == {"small"}


@pytest.mark.parametrize("entry", load_models().values(), ids=lambda entry: entry.name)
def test_entries_are_whole(entry: Entry) -> None:
    assert entry.gguf or entry.safetensors or entry.package
    assert entry.source
    for drafter in entry.drafter:
        assert drafter.source or drafter.builtin
        assert drafter.repository or drafter.builtin
        assert drafter.usable or drafter.note, "what cannot be used says why"
        assert (
            drafter.block_size or "block_size" in drafter.unconfirmed or drafter.kind == "eagle3" or not drafter.usable
        )
    repositories = Counter((d.repository, d.file) for d in entry.drafter)
    assert max(repositories.values(), default=1) == 1
    if entry.sibling:
        assert any(d.kind != "small" for d in find(entry.sibling).drafter)
    for quant, file in entry.gguf_files.items():
        assert quant_of(file.file) == quant
        if file.bytes:
            assert weight_bytes(entry.count, quant) == pytest.approx(file.bytes, rel=0.01 if entry.count > 1e9 else 0.2)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (GOOD.replace('"4B"', "4"), 4, "parameters of model 'mine': a valid string (found 4)"),
        (GOOD.replace('"4B"', '"big"'), 4, "needs a number with M, B or T"),
        (GOOD.replace('family = "f"\n', ""), 1, "family of model 'mine': is missing"),
        (GOOD.replace("family", "famly"), 3, "famly of model 'mine': unknown key, did you mean 'family'?"),
        (GOOD + "n_layer = -1\n", 6, "n_layer of model 'mine': greater than 0 (found -1)"),
        (GOOD + "gguf_files = { Q4_K_M = 7 }\n", 6, "gguf_files.Q4_K_M"),
        (GOOD + "gguf_files = [1]\n", 6, "gguf_files of model 'mine': a valid table (found [1])"),
        (GOOD + 'gguf_files = { Q4_K_X = "a.gguf" }\n', 6, "gguf_files of model 'mine': unknown format 'Q4_K_X'"),
        (GOOD.replace('gguf = "me/mine-GGUF"\n', ""), 1, "model 'mine': needs gguf or safetensors"),
        (GOOD + 'aliases = ["a b"]\n', 6, "aliases.1 of model 'mine'"),
        (GOOD + '[[model.drafter]]\nkind = "magic"\nformat = "gguf"\n', 7, "drafter.1.kind of model 'mine'"),
        (
            GOOD + '[[model.drafter]]\nkind = "dspark"\nformat = "gguf"\n',
            6,
            "drafter.1 of model 'mine': needs repository",
        ),
        (GOOD + '[[model.drafter]]\nkind = "dspark"\n', 6, "drafter.1.format of model 'mine': is missing"),
        (
            GOOD
            + '[[model.drafter]]\nkind = "dspark"\nformat = "gguf"\nrepository = "a/b"\n'
            + '[[model.drafter]]\nkind = "dflash"\nformat = "bin"\n',
            12,
            "drafter.2.format of model 'mine'",
        ),
        (
            GOOD + '[[model.drafter]]\nkind = "dspark"\nformat = "gguf"\nblok_size = 3\n',
            9,
            "did you mean 'block_size'?",
        ),
        (GOOD + GOOD, 7, "name: 'mine' is there twice"),
        (GOOD + 'aliases = ["qwen3-4b"]\n', 6, "'qwen3-4b' already means 'qwen3-4b'"),
        (GOOD + "[general]\nx = 1\n", 6, "unknown table or key 'general'"),
        (GOOD.replace("me/mine-GGUF", "no repository"), 5, "gguf of model 'mine'"),
        (GOOD.replace('name = "mine"\n', ""), 1, "name: is missing"),
    ],
)
def test_errors_name_file_line_and_key(text: str, line: int, says: str) -> None:
    path = own_registry(text)
    with pytest.raises(DsparkError) as error:
        load_models()
    assert str(error.value).startswith(f"{path}, line {line}: "), error.value
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_toml() -> None:
    path = own_registry("[[model]\nname = 1")
    with pytest.raises(DsparkError, match=r"line 1, column") as error:
        load_models()
    assert str(path) in str(error.value)


def test_own_entries_are_added_and_known_ones_overridden() -> None:
    shipped = load_models()["qwen3-4b"]
    own_registry(
        GOOD
        + '[[model]]\nname = "qwen3-4b"\ncontext = 1234\ngguf_files = { Q2_K = "x-Q2_K.gguf" }\n'
        + '[[model.drafter]]\nkind = "dspark"\nformat = "gguf"\nrepository = "me/better"\n'
    )
    models = load_models()
    assert list(models)[-1] == "mine"
    mine = models["qwen3-4b"]
    assert mine.context == 1234
    assert mine.safetensors == shipped.safetensors
    assert {"Q2_K", "Q4_K_M"} <= set(mine.gguf_files)
    assert [d.repository for d in mine.drafter] == ["me/better", *(d.repository for d in shipped.drafter)]


def test_a_changed_file_is_read_again() -> None:
    own_registry(GOOD)
    assert "mine" in load_models()
    path = own_registry(GOOD.replace("mine", "yours"))
    import os

    os.utime(path, ns=(1, 2))
    assert "yours" in load_models()
    path.unlink()
    assert "yours" not in load_models()


def test_names_that_nearly_match() -> None:
    assert find("QWEN2.5-14B-Instruct").name == "qwen2.5-14b"
    for typed, near in (
        ("qwen3-8", "qwen3-8b"),
        ("qwen2.5-14", "qwen2.5-14b"),
        ("smollm", "smollm2"),
        ("gemma4-12", "gemma4-12b"),
    ):
        with pytest.raises(BadInput, match=f"unknown model {re.escape(repr(typed))}") as error:
            find(typed)
        assert near in str(error.value.hint)


@pytest.mark.parametrize("name", ["./x", "../x/y", "a/.b", "-a/b", "a/b-", "a--b/c", "a/b..c", "a/b/c", "a b/c", "a/"])
def test_what_is_no_name_of_a_repository(name: str) -> None:
    """The Hub's client would refuse it with a traceback."""
    assert not is_repository(name)
    for command in (["models", name], ["rm", name]):
        done = CliRunner().invoke(app, command if not name.startswith("-") else [command[0], "--", name])
        assert done.exit_code == 2
        assert f"unknown model {name!r}" in done.stderr
    own_registry(GOOD.replace("me/mine-GGUF", name))
    with pytest.raises(DsparkError, match=r"line 5: gguf of model 'mine': no Hub repository \(owner/name\) \(found"):
        load_models()


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B-GGUF", "some.body/a_model.v2", "a/b"])
def test_names_of_repositories(name: str) -> None:
    assert is_repository(name)


def test_the_table_has_formats_with_sizes_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> list[str]:
        return CliRunner().invoke(app, ["models"]).stdout.splitlines()

    assert table()[0].split("  ")[0] == "name"
    [line] = [line for line in table() if line.startswith("qwen2.5-14b ")]
    assert "Q4_K_M 9.0 GB to BF16 29.5 GB" in line
    assert line.rstrip().endswith("small")
    monkeypatch.setattr(models_command, "WIDE", 200)
    assert "formats" not in table()[0]


def test_one_model_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(Device("cpu", "cpu", 64 * GIB, 60 * GIB))
    monkeypatch.setattr(devices, "this_machine", lambda: machine)
    said = CliRunner().invoke(app, ["models", "qwen3-4b"]).stdout
    assert re.search(r"format +Q8_0 +4\.3 GB  fits cpu, \d\.\d GB with drafter and context\n", said)
    assert re.search(r"format +BF16 +8\.0 GB  needs a GPU that torch drives \(on the CPU: --backend torch\)\n", said)
    assert "block 7; tau gsm8k 6.11, humaneval 5.38, mt_bench 3.64; DSpark paper, June 2026, temperature 1\n" in said
    said = CliRunner().invoke(app, ["models", "qwen3.6-27b"]).stdout
    assert re.search(r"drafter +dflash +z-lab/Qwen3\.6-27B-DFlash \(safetensors\): .*gated", said)


def test_paths_with_spaces_and_unicode(tmp_path: Path, embedded_gguf: Path) -> None:
    folder = tmp_path / "mödel files 日本"
    folder.mkdir()
    link = folder / "a model – Q4.gguf"
    link.symlink_to(embedded_gguf)
    assert resolve(str(link)).path == link
    assert resolve(str(folder)).path == link  # the only one of its folder
    (folder / "b.gguf").symlink_to(embedded_gguf)
    with pytest.raises(DsparkError, match=r"holds 2 GGUF files"):
        check_path(folder)
    with pytest.raises(DsparkError, match=r"without a GGUF file or a config\.json"):
        check_path(tmp_path)


def test_a_part_of_a_split_file_stands_for_all(tmp_path: Path, embedded_gguf: Path) -> None:
    parts = parts_of("m-00001-of-00003.gguf")
    for part in parts:
        (tmp_path / part).write_bytes(b"GGUF")
    assert check_path(tmp_path / parts[2]) == tmp_path / parts[0]
    (tmp_path / parts[1]).unlink()
    with pytest.raises(DsparkError, match=r"one part of a split file, and m-00002-of-00003\.gguf is not beside it"):
        check_path(tmp_path / parts[0])


def test_a_name_stays_a_name_whatever_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-4b").mkdir()
    (tmp_path / "other").mkdir()
    assert not looks_like_path("qwen3-4b")
    assert looks_like_path("other")
    assert not looks_like_path("owner/name")


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-4B-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-14b-instruct-q5_k_m-00001-of-00003.gguf", "Q5_K_M"),
        ("sub/Model.Q8_0.gguf", "Q8_0"),
        ("Model-BF16-00001-of-00002.gguf", "BF16"),
        ("gemma-UD-Q4_K_XL.gguf", None),
        ("Qwen3.6-27B-DSpark.gguf", None),
        ("model-IQ4_XS.gguf", "IQ4_XS"),
    ],
)
def test_formats_in_file_names(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant


@given(st.sampled_from(sorted(BITS)), st.integers(1, 40), st.text("abcXYZ.-", min_size=1, max_size=12))
def test_split_names_round_trip(quant: str, count: int, stem: str) -> None:
    whole = f"{stem}-{quant}.gguf"
    names = parts_of(f"{stem}-{quant}-00001-of-{count:05d}.gguf")
    assert len(names) == count
    assert {whole_name(name) for name in names} == {whole}
    assert [part_of(name) for name in names] == [(i, count) for i in range(1, count + 1)]
    assert part_of(whole) is None


def test_the_shipped_file_validates_by_itself(tmp_path: Path) -> None:
    assert len(_load(registry_file(), tmp_path / "none", 0)) >= 40
