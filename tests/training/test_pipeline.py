"""`dspark train` from nothing to a drafter that drafts, killed on the way and resumed; and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import ARGUMENTS, train
from typer.testing import CliRunner

from dspark_cli.backends.base import DraftRequest, DsparkError, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.quants import Formats
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.torch.drafter import DSparkDrafter, make_drafter
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter, save_gguf_drafter
from dspark_cli.cli import app
from dspark_cli.engine.session import first_difference
from dspark_cli.training.corpus import Corpus, covered, draft_vocabulary
from dspark_cli.training.documents import Document, append_documents, read_documents
from dspark_cli.training.features import FeatureCache, TorchReader
from dspark_cli.training.pipeline import Pipeline, Recipe, rows_for, spread_layers
from dspark_cli.training.trainer import Trainer

NEAR_TIE = 0.01  # logits of float32 weights: sums in another order


def test_it_learns_and_leaves_everything_a_drafter_needs(trained: Path, tiny_target: Path) -> None:
    curve = [json.loads(line) for line in (trained / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["expected_tau"] > curve[0]["expected_tau"] + 0.05
    assert curve[-1]["positions"] > 0
    recipe = json.loads((trained / "d.gguf.recipe.json").read_text())
    assert shlex.split(recipe["command"])[:3] == ["dspark", "train", str(tiny_target)]
    assert recipe["shape"] == {
        "kind": "dspark", "layers": 1, "block": 3, "rank": 8, "vocabulary": 512, "target_layers": [1, 2]
    }  # fmt: skip
    calibration = json.loads((trained / "d.gguf.calibration.json").read_text())
    assert len(calibration["survival"]) == 3
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert {row["prompts"] for row in evaluation["rows"]} > {"question", "code", "all"}
    assert "</svg>" in (trained / "d.gguf.svg").read_text()
    card = (trained / "d.gguf.md").read_text()
    assert "| all | 0 |" in card
    assert f"| {curve[-1]['expected_tau']:.2f} |" in card


def test_libllama_and_torch_draft_the_same_from_the_exported_file(
    trained: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """Same features in, same tokens and confidences out; a difference is allowed where two logits nearly tie."""
    options = ContextOptions(ctx=512, kv_type="f32", flash_attn="off")
    model = load_gguf_drafter(trained / "d.gguf", tiny_target)
    path = save_gguf_drafter(model, tmp_path / "d.F32.gguf", tiny_target, Formats("F32"))
    ids = next(iter(read_documents(trained / "documents.jsonl"))).ids
    with (
        LlamaCppTarget(tiny_target, options) as target,
        LlamaCppDrafter(path, target, options) as native,
        make_drafter(model, name="d") as ours,
    ):
        target.request_features(native.feature_layers)
        assert ours.feature_layers == native.feature_layers
        for k in range(40, 80):
            features = target.step([Row(0, ids[:k])])[0].features
            for drafter in (native, ours):
                drafter.observe(0, ids[:k], features)
            request = DraftRequest(0, ids[k], 3)
            theirs, mine = native.propose([request])[0], ours.propose([request])[0]
            first = first_difference(mine.tokens.tolist(), theirs.tokens.tolist())
            if first is not None:
                assert margin(model, ours, request, first) < NEAR_TIE
            reached = slice(0, first)
            np.testing.assert_allclose(mine.confidence[reached], theirs.confidence[reached], atol=2e-3)  # type: ignore[index]
            for keeper in (target, native, ours):
                keeper.drop(0)


def margin(model: DSpark, drafter: DSparkDrafter, request: DraftRequest, position: int) -> float:
    """First minus second corrected logit at `position` of the greedy draft."""
    rows: list[torch.Tensor] = []

    def pick(k: int, logits: torch.Tensor) -> torch.Tensor:
        rows.append(logits[0])
        return drafter.vocabulary.best(k, logits)

    with torch.inference_mode():
        anchors = torch.tensor([request.anchor])
        model.chain(model.drafting_rows(drafter._block([0], anchors)), anchors, position + 1, pick)
    best = rows[position].topk(2).values
    return float(best[0] - best[1])


def test_a_finished_training_says_so_again_and_goes_on_when_asked_for_more(trained: Path, tiny_target: Path) -> None:
    before = json.loads((trained / "curve.jsonl").read_text().splitlines()[-1])["positions"]
    result = train(tiny_target, trained, "--out", str(trained / "d.gguf"), "--anchors", "40000", "--json")
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert json.loads(result.stdout)["drafter"].endswith("d.gguf")  # type: ignore[attr-defined]
    assert json.loads((trained / "curve.jsonl").read_text().splitlines()[-1])["positions"] > before


def test_a_budget_of_anchors_is_kept_whatever_the_machine_does(
    trained: Path, tiny_target: Path, tmp_path: Path
) -> None:
    for name in ("documents.jsonl", "features"):
        (tmp_path / name).symlink_to(trained / name)
    recipe = Recipe("tiny", block=3, rank=8, vocabulary=512, hours=1e-9, through="torch", anchors=2000)
    silent = SimpleNamespace(begin=lambda *a: None, advance=lambda *a: None, end=lambda: None)
    trainer, _ = Pipeline(tiny_target, tmp_path, recipe, silent).train()  # type: ignore[arg-type]
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    most = trainer.options.documents * trainer.options.anchors  # of the step that reaches the budget
    assert 2000 <= curve[-1]["positions"] == trainer.progress.positions < 2000 + most
    assert len(curve) > 2, "the way there is told too"


def test_another_recipe_needs_another_folder(trained: Path, tiny_target: Path) -> None:
    result = train(tiny_target, trained, "--block", "4")
    assert result.exit_code == 1  # type: ignore[attr-defined]
    assert "block 3, now 4" in result.output  # type: ignore[attr-defined]


def test_another_file_of_the_same_name_needs_another_folder(tiny_target: Path, tmp_path: Path) -> None:
    """`--quant` chooses among the files of one model."""
    recipe = Recipe("tiny")
    Pipeline(tiny_target, tmp_path / "work", recipe, SimpleNamespace())  # type: ignore[arg-type]
    other = tmp_path / "tiny.Q8_0.gguf"
    other.write_bytes(tiny_target.read_bytes())
    with pytest.raises(DsparkError, match=r"file 'tiny.F32.gguf', now 'tiny.Q8_0.gguf'"):
        Pipeline(other, tmp_path / "work", recipe, SimpleNamespace())  # type: ignore[arg-type]


def test_on_an_accelerator_nothing_is_stored_and_the_target_reads_along_the_way(
    tiny_target: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driven here with the CPU in its place: what differs there is the path, not the numbers."""
    monkeypatch.setattr("dspark_cli.training.pipeline.Pipeline.live", True)
    work = tmp_path / "live"
    result = train(tiny_target, work, "--anchors", "15000", "--documents", str(trained / "documents.jsonl"))
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert not (work / "features").exists()
    curve = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["expected_tau"] > curve[0]["expected_tau"] + 0.05
    recipe = json.loads((work / "tiny.F32-dspark.gguf.recipe.json").read_text())
    assert recipe["tokens"] >= 12_000


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_the_other_drafters_train_too(tiny_target: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    work = tmp_path / kind
    documents = ["--documents", str(trained / "documents.jsonl")]
    result = train(tiny_target, work, "--drafter", kind, "--anchors", "15000", *documents)
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    curve = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["expected_tau"] > curve[0]["expected_tau"]
    made = work / f"tiny.F32-{kind}{'.gguf' if kind == 'dflash' else ''}"
    assert made.is_dir() == (kind == "eagle3")


@pytest.mark.parametrize("seconds", [5.0, 10.0])
def test_killed_at_any_moment_the_same_command_goes_on(tiny_target: Path, tmp_path: Path, seconds: float) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-m", "dspark_cli", "train", str(tiny_target), "--work", str(work), *ARGUMENTS]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(os.environ))
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for torn in ("documents.jsonl", "features/index.jsonl"):
        if (work / torn).exists():
            with (work / torn).open("a") as file:
                file.write('{"ids": [1, 2')
    result = train(tiny_target, work)
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    documents = list(read_documents(work / "documents.jsonl"))
    cache = FeatureCache(work / "features", target=tiny_target.name, layers=(1, 2), width=64)
    assert [s.length for s in cache.stretches] == [len(d.ids) for d in documents]
    assert (work / "tiny.F32-dspark.gguf").exists()


def test_a_full_disk_keeps_what_was_finished(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark_cli.backends.torch.gguf_model import load_gguf_model

    documents = [Document(tuple(range(100, 130 + n)), 5, 0.0) for n in range(6)]
    cache = FeatureCache(tmp_path, target="t", layers=(1,), width=64)
    model = load_gguf_model(tiny_target)
    stored = FeatureCache._store

    def full(self: FeatureCache, document: Document, *rest: object) -> None:
        if len(document.ids) == 33:
            raise OSError(28, "No space left on device")
        stored(self, document, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureCache, "_store", full)
    with pytest.raises(DsparkError, match="No space left on device; the first 93 tokens are kept"):
        cache.append(TorchReader(model), documents, lambda n: None)
    monkeypatch.undo()
    again = FeatureCache(tmp_path, target="t", layers=(1,), width=64)
    assert again.tokens == 93
    again.append(TorchReader(model), documents, lambda n: None)
    assert again.array("features.f16").shape == (sum(len(d.ids) for d in documents), 64)


def test_an_index_ahead_of_its_data_is_cut(tiny_target: Path, tmp_path: Path) -> None:
    """After a power cut: lines of the index are there, the features they speak of are not."""
    from dspark_cli.backends.torch.gguf_model import load_gguf_model

    documents = [Document(tuple(range(100, 130 + n)), 5, 0.0) for n in range(3)]
    reader = TorchReader(load_gguf_model(tiny_target))
    FeatureCache(tmp_path, target="t", layers=(1,), width=64).append(reader, documents, lambda n: None)
    whole = (tmp_path / "features.f16").read_bytes()
    (tmp_path / "features.f16").write_bytes(whole[:-300])
    cache = FeatureCache(tmp_path, target="t", layers=(1,), width=64)
    assert cache.tokens == 30 + 31
    cache.append(reader, documents, lambda n: None)
    assert [s.length for s in cache.stretches] == [30, 31, 32]
    assert (tmp_path / "features.f16").stat().st_size == len(whole)
    assert np.abs(cache.array("features.f16")[-1]).max() > 0


def test_too_little_disk_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    cache = FeatureCache(tmp_path, target="t", layers=(1,), width=64)
    with pytest.raises(DsparkError, match=r"features need .* GB, .* has 0\.0 GB free"):
        cache.append(TorchReader(None), [Document((1, 2, 3), 1, 0.0)], lambda n: None)


def test_features_of_another_target_are_not_mixed(tmp_path: Path) -> None:
    FeatureCache(tmp_path, target="a.gguf", layers=(1,), width=64)
    with pytest.raises(DsparkError, match=r"holds features of .*a\.gguf"):
        FeatureCache(tmp_path, target="b.gguf", layers=(1,), width=64)


def test_the_draft_vocabulary_is_the_frequent_tokens(tmp_path: Path, tiny_target: Path) -> None:
    from dspark_cli.backends.torch.gguf_model import load_gguf_model

    documents = [Document((5, 6, *([77] * 4), *([88] * 3), 99), 2, 0.0)] * 3
    cache = FeatureCache(tmp_path, target="t", layers=(1,), width=64)
    cache.append(TorchReader(load_gguf_model(tiny_target)), documents, lambda n: None)
    corpus = Corpus.stored(cache, held_out=documents[0].held_out)
    ids = draft_vocabulary(corpus, 2, 49152)
    assert ids.tolist() == [77, 88]
    assert covered(corpus, ids) == pytest.approx(7 / 8)
    assert draft_vocabulary(corpus, 2, 49152, [3]).tolist() == [3, 77]
    assert covered(corpus, np.asarray([3])) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "medusa"], "unknown drafter 'medusa': one of dspark, dflash, eagle3"),
        (["--head", "mlp"], "unknown head 'mlp'"),
        (["--through", "onnx"], "unknown --through 'onnx'"),
        (["--format", "Q2_K"], "unknown format 'Q2_K'"),
        (["--drafter", "eagle3", "--out", "e.gguf"], "an Eagle3 drafter has no form as a GGUF file"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt is no file"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(
    tiny_target: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["train", str(tiny_target), "--work", str(tmp_path / "w"), *arguments])
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ids": [1, 2, 60000, 4], "answer_start": 2}', "line 2: ids that are none of the target's 49152 tokens"),
        ('{"ids": [1, 2, -3, 4], "answer_start": 2}', "line 2: ids that are none"),
        ('{"ids": [1, 2, 3, 4], "answer_start": 9}', "line 2: answer_start 9 of 4 ids"),
        ('{"ids": 7}', "line 2: not a document"),
    ],
)
def test_documents_that_are_none_of_this_target_leave_nothing_behind(
    tiny_target: Path, tmp_path: Path, line: str, message: str
) -> None:
    given, work = tmp_path / "given.jsonl", tmp_path / "work"
    given.write_text('{"ids": [1, 2, 3, 4], "answer_start": 2}\n' + line + "\n")
    result = train(tiny_target, work, "--documents", str(given))
    assert result.exit_code in (1, 2)  # type: ignore[attr-defined]
    assert message in result.output.replace("\n", "")  # type: ignore[attr-defined]
    assert not (work / "documents.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), 3, "more memory than there is"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "more memory than there is"),
        (OSError(28, "No space left on device", "checkpoint.tmp"), 1, "checkpoint.tmp: No space left on device"),
    ],
)
def test_memory_and_disk_that_run_out_in_training_are_said_and_the_work_is_kept(
    tiny_target: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "step", fail)
    work = tmp_path / "work"
    result = train(tiny_target, work, "--documents", str(trained / "documents.jsonl"))
    assert result.exit_code == code  # type: ignore[attr-defined]
    assert message in result.output  # type: ignore[attr-defined]
    assert "work is kept" in result.output.replace("\n", "")  # type: ignore[attr-defined]
    assert FeatureCache(work / "features", target=tiny_target.name, layers=(1, 2), width=64).tokens >= 12_000


def test_a_drafter_with_another_head_is_no_beginning(tiny_target: Path, trained: Path, tmp_path: Path) -> None:
    arguments = ["--head", "gated", "--documents", str(trained / "documents.jsonl"), "--from", str(trained / "d.gguf")]
    result = train(tiny_target, tmp_path / "work", *arguments)
    assert result.exit_code == 1  # type: ignore[attr-defined]
    assert "its markov_head_type is vanilla, asked for is gated" in result.output  # type: ignore[attr-defined]


def test_prompts_of_the_user_open_the_user_turns(tiny_target: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why is the sky blue?\n\nName three rivers.\n", encoding="utf-8")
    work = tmp_path / "work"
    result = train(tiny_target, work, "--prompts", str(prompts), "--max-hours", "0.0000001")
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert "the same command goes on" in result.output  # type: ignore[attr-defined]
    with LlamaCppTarget(tiny_target, ContextOptions(ctx=64)) as target:
        texts = [target.tokenizer.decode(d.ids) for d in read_documents(work / "documents.jsonl")]
    assert texts
    assert all("Why is the sky blue?" in t or "Name three rivers." in t for t in texts)


def test_a_short_order_is_not_written_by_more_rows_than_it_has_texts() -> None:
    """Of 2048 texts begun at once, the first 500 000 tokens that are finished would be the short ones."""
    assert rows_for(8_300_000, 566, 2048) == 2048
    assert rows_for(8_300_000, 566, 256) == 256
    assert 200 <= rows_for(500_000, 566, 2048) < 500_000 / 566
    assert rows_for(1000, 566, 256) == 32


def test_layers_are_spread_over_what_can_be_read() -> None:
    assert spread_layers(30) == (1, 8, 14, 21, 28)
    assert spread_layers(4) == (1, 2)
    assert all(0 <= i <= n - 2 for n in range(2, 80) for i in spread_layers(n))


def test_documents_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    append_documents(path, [Document((1, 2, 3), 1, 0.5)])
    with path.open("a") as file:
        file.write('{"ids": [1')
    assert list(read_documents(path)) == [Document((1, 2, 3), 1, 0.5)]
