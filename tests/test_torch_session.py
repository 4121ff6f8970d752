"""A checkpoint folder through what users run: sessions, drafter folders beside it, bench, and the command itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_cli.backends.base import BadInput, DsparkError, PairMismatch  # noqa: E402
from dspark_cli.bench.local import Results, Settings, run_all  # noqa: E402
from dspark_cli.engine.profile import file_facts  # noqa: E402
from dspark_cli.engine.rounds import Request, SamplingOptions  # noqa: E402
from dspark_cli.engine.session import OpenOptions, Session  # noqa: E402
from dspark_cli.engine.stats import Stats  # noqa: E402
from tiny import DRAFTER, EAGLE, tiny_checkpoint, tiny_config, tiny_drafter, tiny_gguf, tiny_model  # noqa: E402

DFLASH = replace(DRAFTER, kind="dflash", markov_rank=0, confidence_head=False, confidence_head_with_markov=False)
DRAFTERS = {"dspark": "draft", "dflash": "dflash", "eagle3": "eagle", "small": "target"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("torch"))


def save_files(folder: Path) -> Path:
    """The tiny target and its drafters."""
    tiny_checkpoint(folder / "target")
    for name, config in {"draft": DRAFTER, "dflash": DFLASH, "eagle": EAGLE}.items():
        tiny_drafter(folder / name, config)
    return folder


def options(files: Path, drafter: str, **more: object) -> OpenOptions:
    path = drafter if drafter in ("lookup", "none") else str(files / DRAFTERS.get(drafter, drafter))
    settings = {"device": "cpu", "threads": 1, **more}
    return OpenOptions(files / "target", "tiny", drafter=path, ctx=256, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["fixed:3", "threshold:0.2", "auto"])
@pytest.mark.parametrize("drafter", [*DRAFTERS, "lookup"])
def test_greedy_text_is_that_of_plain_decoding(files: Path, drafter: str, policy: str) -> None:
    with Session.open(options(files, drafter, policy=policy)) as session:
        assert session.target.info.backend == "torch"
        assert getattr(session.drafter, "model", session.drafter).kind == drafter
        request = session.chat_request(
            [{"role": "user", "content": "one two three one two"}], max_tokens=40, sampling=SamplingOptions()
        )
        report = session.check(request)
        assert report.identical
        assert report.tokens > 1
        if policy == "fixed:3":
            stats = Stats.of(list(session.run(request)))
            assert stats.drafted > 0


@pytest.mark.parametrize("accept", ["exact", "residual"])
@pytest.mark.parametrize("drafter", ["dspark", "eagle3"])
def test_a_seed_gives_the_same_text_again(files: Path, drafter: str, accept: str) -> None:
    sampling = SamplingOptions(temperature=0.8, top_p=0.95, seed=3, accept=accept)  # type: ignore[arg-type]
    texts = []
    for _ in range(2):
        with Session.open(options(files, drafter, policy="fixed:4")) as session:
            request = session.text_request("abc abc", max_tokens=30, sampling=sampling)
            texts.append([t for r in session.run(request) for t in r.tokens])
            plain = [t for r in session.run(request, plain=True) for t in r.tokens]
    assert texts[0] == texts[1]
    if accept == "exact":
        assert texts[0] == plain


@pytest.mark.parametrize("drafter", ["dspark", "eagle3", "lookup"])
def test_several_requests_share_passes(files: Path, drafter: str) -> None:
    """More requests than sequences, ragged: each says what it says alone."""
    with Session.open(options(files, drafter, policy="fixed:3", n_seq=3)) as session:
        texts = ("a b c a b", "hello", "x" * 30, "again and again", "a b c a b c")
        requests = [
            replace(session.text_request(text, max_tokens=24, sampling=SamplingOptions()), id=i)
            for i, text in enumerate(texts)
        ]
        together: dict[int, list[int]] = {request.id: [] for request in requests}
        rounds = list(session.run_all(requests))
        for item in rounds:
            together[item.request] += item.tokens
        assert max(r.shared for r in rounds) == 3
        alone = {r.id: [t for item in session.run(r, plain=True) for t in item.tokens] for r in requests}
    assert together == alone


def test_a_second_turn_computes_only_what_is_new(files: Path) -> None:
    with Session.open(options(files, "dspark", policy="fixed:2")) as session:
        first = session.text_request("Tell me about the sea.", max_tokens=10, sampling=SamplingOptions())
        said = [t for r in session.run(first) for t in r.tokens]
        longer = [*first.prompt, *said, *session.target.tokenizer.encode(" And more.")]
        begun = next(iter(session.run(Request(longer, 4))))
    assert begun.cached >= len(first.prompt) + len(said) - 1


def test_another_drafter_beside_a_loaded_target(files: Path) -> None:
    """What /drafter and /policy of the chat window do; the text stays."""
    with Session.open(options(files, "lookup", policy="fixed:3")) as session:
        request = session.text_request("one two three one two", max_tokens=20, sampling=SamplingOptions())
        found = []
        for drafter, policy in (("lookup", "fixed:2"), ("dspark", "fixed:3"), ("eagle3", "auto"), ("none", "off")):
            session.switch(options(files, drafter, policy=policy))
            assert session.policy == policy
            found.append([t for r in session.run(request) for t in r.tokens])
        with pytest.raises(DsparkError, match=r"no config.json"):
            session.switch(options(files, str(files)))
        found.append([t for r in session.run(request) for t in r.tokens])
    assert found == [found[0]] * 5


def test_formats_are_of_ggufs(files: Path) -> None:
    from dspark_cli.cli.bench import _formats

    with pytest.raises(BadInput, match="target is a checkpoint folder"):
        _formats("Q8_0", files / "target")
    assert _formats(None, files / "target") == [files / "target"]


def test_bench_runs_on_it(files: Path) -> None:
    results = Results()
    settings = Settings(kinds=("question",), temperatures=(0.0,), prompts=1, tokens=8, repeats=1)
    run_all(options(files, "dspark"), [files / "target"], settings, results)
    assert results.backend == "torch"
    assert {"plain", "auto", "fixed:2", "auto dspark"} <= {run.arm for run in results.runs}
    assert all(run.first_difference is None for run in results.runs)


class TestWrongDrafters:
    def test_a_gguf_beside_a_checkpoint(self, files: Path) -> None:
        with pytest.raises(BadInput, match="needs a checkpoint folder"):
            Session.open(options(files, str(tiny_gguf(files / "other.gguf"))))

    def test_a_drafter_of_another_target(self, files: Path, tmp_path: Path) -> None:
        other = tiny_drafter(tmp_path / "other", replace(DRAFTER, num_target_layers=9, target_layer_ids=(0, 2, 7)))
        with pytest.raises(PairMismatch, match="layer 7"):
            Session.open(options(files, str(other)))

    def test_a_small_model_of_another_vocabulary(self, files: Path, tmp_path: Path) -> None:
        model = tiny_model(tiny_config(vocab_size=700))
        with pytest.raises(PairMismatch, match="vocabulary of 700 tokens, the target has 260"):
            Session.open(options(files, str(tiny_checkpoint(tmp_path / "other", model))))

    def test_a_folder_that_is_neither(self, files: Path, tmp_path: Path) -> None:
        with pytest.raises(DsparkError, match=r"no config.json"):
            Session.open(options(files, str(tmp_path)))

    def test_kv_types_of_llamacpp(self, files: Path) -> None:
        with pytest.raises(BadInput, match=r"--kv-type q8_0 is of llama\.cpp"):
            Session.open(options(files, "lookup", kv_type="q8_0"))


def test_a_cost_profile_belongs_to_these_weights(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "target", tmp_path / "copy")
    before = file_facts(tmp_path / "copy")
    assert before is not None
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"x")
    assert file_facts(tmp_path / "copy") != before


def dspark(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dspark_cli", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command(files: Path, tmp_path: Path) -> None:
    target, drafter = str(files / "target"), str(files / "draft")
    done = dspark("generate", target, "hi", "--drafter", drafter, "--json", "--max-tokens", "20", "--policy", "fixed:3")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["backend"], answer["format"], answer["drafter"]) == ("torch", "F32", "draft")
    assert answer["drafted"] > 0
    assert "backend torch on cpu: a checkpoint folder runs through torch" in done.stderr
    talk = dspark("chat", target, "--plain", "--drafter", "lookup", "--max-tokens", "8", stdin="hello\nagain\n")
    assert talk.returncode == 0, talk.stderr
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("again and again", "count", "x")))
    many = dspark("batch", str(prompts), "-o", str(out), "--model", target, "--drafter", drafter, "--max-tokens", "8")
    assert many.returncode == 0, many.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["backend"], line["tokens"]) for line in lines] == [("torch", 8)] * 3
    wrong = dspark("generate", drafter, "hi")
    assert wrong.returncode == 2
    assert "is a drafter, not a model that can answer" in wrong.stderr
    assert "Traceback" not in wrong.stderr
