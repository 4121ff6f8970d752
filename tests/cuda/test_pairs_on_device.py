"""Targets and drafters on the device: drafts, dtypes, sessions, the law of sampled answers.

What `test_torch_session.py` asks of a session on a CPU is asked here of one on the device.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from cuda_device import DEVICE, ON_GPU, PATH, opened, torch

pytest.importorskip("transformers")

import test_torch_session
from dspark_cli.backends.base import DraftRequest, Row
from dspark_cli.backends.torch.checkpoint import build
from dspark_cli.backends.torch.devices import detect, pick
from dspark_cli.backends.torch.drafter import make_drafter, open_drafter
from dspark_cli.backends.torch.network import Network
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off
from dspark_cli.kernels import dispatch
from test_exactness import LIMIT, PROMPT, exact_law, excess
from test_exactness import N_VOCAB as FEW
from test_golden_engine import IdTokenizer
from test_torch_drafter import CONFIGS, model_for, sampler, text
from test_torch_session import (  # noqa: F401  (collected here once more, with the options below)
    test_a_seed_gives_the_same_text_again,
    test_greedy_text_is_that_of_plain_decoding,
    test_several_requests_share_passes,
)
from tiny import DRAFTER, EAGLE, HIDDEN, N_LAYER, N_VOCAB, tiny_checkpoint, tiny_config, tiny_drafter, tiny_model


@pytest.fixture(autouse=True)
def _sessions_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = test_torch_session.options
    monkeypatch.setattr(test_torch_session, "options", lambda *args, **more: on_cpu(*args, device=DEVICE, **more))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("path", sorted({PATH, "reference"}))
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_drafts_are_those_of_a_cpu(name: str, path: str, sampled: bool) -> None:
    """Three ragged sequences in scattered slots, a fork and a rewind; float32 here and there."""
    drafts = []
    for device in ("cpu", DEVICE):
        dispatch.use(path)
        model = copy.deepcopy(model_for(CONFIGS[name])).to(device)
        drafter = make_drafter(model, name="test")
        for slot, length in ((5, 3), (0, 300), (3, 7)):
            drafter.observe(slot, *text(length, seed=length))
        drafter.fork(0, 2, 270)
        drafter.rewind(0, 290)
        requests = [DraftRequest(slot, slot, 4, sampler(slot) if sampled else None) for slot in (5, 0, 3, 2)]
        drafts.append(drafter.propose(requests))
    for mine, theirs in zip(*drafts, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        for word in ("confidence", "probs"):
            ours, others = getattr(mine, word), getattr(theirs, word)
            assert (ours is None) == (others is None)
            if ours is not None:
                np.testing.assert_allclose(ours, others, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_drafters_draft(dtype: torch.dtype) -> None:
    """Alone and in a batch the same: rows of a pass do not touch each other."""
    dispatch.use(PATH)
    model = copy.deepcopy(model_for(CONFIGS["dspark"])).to(DEVICE, dtype)
    together, alone = make_drafter(model, name="many"), []
    for slot, length in enumerate((3, 11, 7)):
        single = make_drafter(model, name="one")
        for drafter, seq in ((single, 0), (together, slot)):
            drafter.observe(seq, *text(length, seed=length))
        alone += single.propose([DraftRequest(0, length, 4)])
    found = together.propose([DraftRequest(slot, length, 4) for slot, length in enumerate((3, 11, 7))])
    same = sum(a.tokens[0] == b.tokens[0] for a, b in zip(found, alone, strict=True))
    assert same >= 2, "more than one near-tie among three"
    assert all(draft.confidence is not None and np.isfinite(draft.confidence).all() for draft in found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_pairs(tmp_path: Path, dtype: str) -> None:
    """Near float32; and drafted greedy text differs from plain text only where two logits are nearly equal."""
    tokens = np.random.default_rng(0).integers(0, N_VOCAB, size=30).tolist()
    with opened(tiny_checkpoint(tmp_path / "full")) as full:
        wanted = full.step([Row(0, tokens)])[0].logits
    folder = tiny_checkpoint(tmp_path / "half", tiny_model().to(getattr(torch, dtype)))
    with opened(folder, dtype=None if ON_GPU else dtype) as half:
        assert half.info.format == {"bfloat16": "BF16", "float16": "F16"}[dtype]
        found = half.step([Row(0, tokens)])[0].logits
        assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1
        drafter = open_drafter(
            tiny_drafter(tmp_path / "drafter"),
            n_vocab=N_VOCAB,
            n_embd=HIDDEN,
            n_layer=N_LAYER,
            dtype=getattr(torch, dtype),
            device=half.info.device,
        )
        half.drop(0)
        request = Request(half.tokenizer.encode("one two three"), 60)
        rounds = list(Engine(half, None, Off(), margins=True).run([request]))
        plain = [t for r in rounds for t in r.tokens]
        margins = [m for r in rounds for m in r.margins or ()]
        half.drop(0)
        drafted = [t for r in Engine(half, drafter, Fixed(4)).run([request]) for t in r.tokens]
    first = next((i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b), None)
    assert first is None or margins[first] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kernels", sorted({PATH, "reference"}))
def test_the_command(files: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", kernels)
    command = [
        sys.executable,
        "-m",
        "dspark_cli",
        "generate",
        str(files / "target"),
        "hi",
        "--backend",
        DEVICE,
        "--json",
    ]
    more = ["--drafter", str(files / "draft"), "--max-tokens", "20", "--policy", "fixed:3"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["backend"], answer["drafter"]) == ("torch", "draft")
    assert answer["drafted"] > 0
    assert "Traceback" not in done.stderr


# -- the law -----------------------------------------------------------------------------------------------------------


@contextmanager
def few_tokens(n_seq: int) -> Iterator[TorchTarget]:
    """A target over so few tokens that the law of its answers can be written down."""
    config = tiny_config(vocab_size=FEW, num_hidden_layers=4, eos_token_id=None)
    model = tiny_model(config, seed=5).to(DEVICE)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.4)  # nothing certain, nothing impossible
    model.set_attn_implementation("dspark_grouped")
    settings = TorchOptions(ctx=64, n_seq=n_seq, threads=2, device=DEVICE)
    network, facts = Network(model, "few"), pick(DEVICE, detect())
    with TorchTarget(network, IdTokenizer(FEW), lambda m, t: "", facts, settings, name="few", path="") as target:
        yield target


class Rows:
    """Logits [V] after some tokens, each context computed once."""

    def __init__(self, target: TorchTarget) -> None:
        self.target = target
        self.row: Callable[[Sequence[int]], np.ndarray] = lambda text: self._row(tuple(text))
        self._row = lru_cache(maxsize=None)(self._compute)

    def _compute(self, text: tuple[int, ...]) -> np.ndarray:
        self.target.drop(0)
        return self.target.step([Row(0, list(text), 1)])[0].logits[0].copy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
@pytest.mark.parametrize("accept", ["exact", "residual"])
def test_sampled_answers_have_the_targets_law(kind: str, accept: str) -> None:
    """Drafts drawn on the device, eight sequences at once, passes recorded."""
    base = DRAFTER if kind == "dspark" else EAGLE
    config = replace(base, vocab_size=FEW, draft_vocab_size=FEW, block_size=3, num_target_layers=4)
    torch.manual_seed(2)
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampling = SamplingOptions(temperature=1.0, accept=accept)  # type: ignore[arg-type]
    with few_tokens(n_seq=8) as target:
        law = exact_law(Rows(target), sampling)  # type: ignore[arg-type]
        drafter = make_drafter(model.to(DEVICE).eval(), name=kind)
        requests = [Request(PROMPT, 4, replace(sampling, seed=1000 + i), id=i) for i in range(2000)]
        answers: dict[int, list[int]] = {}
        accepted = 0
        for item in Engine(target, drafter, Fixed(3)).run(requests):
            answers.setdefault(item.request, []).extend(item.tokens)
            accepted += item.accepted
    assert accepted > 500
    assert excess(Counter(tuple(a) for a in answers.values()), law) < LIMIT
