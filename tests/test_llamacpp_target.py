"""The llama.cpp target on the embedded model: passes, sequences, rewinds, features, tokenizer, template."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dspark_cli.backends.base import BadInput, DsparkError, PairMismatch, Row
from dspark_cli.backends.llamacpp import native
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.engine.text import TextStream

# Passes of different width use different kernels on a CPU: logits of size 10-30 agree to about 0.1 on Q4_1.
ATOL = 0.35


@pytest.fixture(scope="module")
def target(embedded_gguf: Path) -> Iterator[LlamaCppTarget]:
    with LlamaCppTarget(embedded_gguf, ContextOptions(ctx=512, n_seq=3)) as target:
        yield target


@pytest.fixture(autouse=True)
def empty(target: LlamaCppTarget) -> Iterator[None]:
    yield
    target.request_features(())
    for seq in range(3):
        target.drop(seq)


@pytest.fixture(scope="module")
def text(target: LlamaCppTarget) -> list[int]:
    return target.tokenizer.encode("The quick brown fox jumps over the lazy dog and runs into the dark forest. " * 3)


def test_chunks_equal_one_pass(target: LlamaCppTarget, text: list[int]) -> None:
    whole = target.step([Row(0, text)])[0].logits.copy()
    parts = [target.step([Row(1, text[i : i + 7])])[0].logits.copy() for i in range(0, len(text), 7)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=ATOL)
    assert target.length(0) == target.length(1) == len(text)


def test_several_sequences_equal_each_alone(target: LlamaCppTarget, text: list[int]) -> None:
    pieces = [text[:9], text[3:20], text[10:12]]
    alone = []
    for piece in pieces:
        alone.append(target.step([Row(0, piece, 1)])[0].logits.copy())
        target.drop(0)
    together = target.step([Row(seq, piece, 1) for seq, piece in enumerate(pieces)])
    for mine, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(mine.logits, theirs, atol=ATOL)


def test_rewind_is_as_if_never_seen(target: LlamaCppTarget, text: list[int]) -> None:
    target.step([Row(0, text[:10])])
    fresh = target.step([Row(0, text[10:14])])[0].logits.copy()
    target.rewind(0, 10)
    target.step([Row(0, text[20:30])])
    target.rewind(0, 10)
    assert target.length(0) == 10
    np.testing.assert_allclose(target.step([Row(0, text[10:14])])[0].logits, fresh, atol=1e-4)


def test_fork_shares_the_prefix(target: LlamaCppTarget, text: list[int]) -> None:
    target.step([Row(0, text[:12])])
    target.fork(0, 2, 8)
    assert target.length(2) == 8
    forked = target.step([Row(2, text[8:12])])[0].logits.copy()
    target.rewind(0, 8)
    np.testing.assert_allclose(forked, target.step([Row(0, text[8:12])])[0].logits, atol=1e-3)


def test_features_belong_to_their_tokens_however_they_are_batched(target: LlamaCppTarget, text: list[int]) -> None:
    d = target.info.n_embd
    target.request_features((-1, 9, 28))
    whole = target.step([Row(0, text[:20], 0)])[0].features
    assert whole is not None
    assert whole.shape == (20, 3 * d)
    whole = whole.copy()
    singles = np.concatenate([target.step([Row(1, [t])])[0].features.copy() for t in text[:20]])  # type: ignore[union-attr]
    np.testing.assert_allclose(singles[:, :d], whole[:, :d], atol=1e-5)  # embeddings: no kernels in between
    for layer in (1, 2):
        mine, theirs = singles[:, layer * d : (layer + 1) * d], whole[:, layer * d : (layer + 1) * d]
        cosine = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosine.min() > 0.99
        shifted = (
            (mine[1:] * theirs[:-1]).sum(1) / np.linalg.norm(mine[1:], axis=1) / np.linalg.norm(theirs[:-1], axis=1)
        )
        assert np.median(shifted) < 0.98, "features of neighbours are told apart by this test"
    target.request_features((28,))
    again = target.step([Row(2, text[:20], 0)])[0].features
    np.testing.assert_allclose(again, whole[:, 2 * d :], atol=1e-3)


@pytest.mark.parametrize("layer", [-2, 29, 30, 99])
def test_layers_that_do_not_exist(target: LlamaCppTarget, layer: int) -> None:
    with pytest.raises(PairMismatch, match=f"layer {layer}"):
        target.request_features((1, layer))


def test_the_tokenizer_keeps_odd_text(target: LlamaCppTarget) -> None:
    for sample in ("naïve 😀 日本語 \x07 tab\t\n\n  two  spaces", "Ω≈ç√∫ 👩‍👩‍👧 🏳️‍🌈", "", " ", "<|im_end|>"):
        ids = target.tokenizer.encode(sample)
        assert target.tokenizer.decode(ids) == sample
        stream = TextStream(target.tokenizer)
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(pieces) == sample
        assert not any("\ufffd" in piece for piece in pieces)
    assert target.tokenizer.encode("<|im_end|>", special=True) == [2]
    assert {0, 2} <= target.tokenizer.eog_ids


def test_the_chat_template_is_the_models(target: LlamaCppTarget) -> None:
    prompt = target.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    own = target.render_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_template_is_sandboxed(target: LlamaCppTarget) -> None:
    template = target.template
    original, template.source = template.source, "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    template.__dict__.pop("_template", None)
    try:
        with pytest.raises(DsparkError, match="refuses"):
            template.render([{"role": "user", "content": "Hi"}])
    finally:
        template.source = original
        template.__dict__.pop("_template", None)


def test_options_that_cannot_be(embedded_gguf: Path) -> None:
    with pytest.raises(BadInput, match="99999 is more than the 8192"):
        LlamaCppTarget(embedded_gguf, ContextOptions(ctx=99_999))
    with pytest.raises(BadInput, match="unknown KV type"):
        ContextOptions(kv_type="q3")
    with pytest.raises(BadInput, match="flash attention"):
        ContextOptions(flash_attn="maybe")


def test_a_second_turn_computes_only_what_is_new(embedded_gguf: Path) -> None:
    with Session.open(OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", ctx=512)) as session:
        messages = [{"role": "user", "content": "Tell me about the sea."}]
        request = session.chat_request(messages, max_tokens=20, sampling=SamplingOptions())
        rounds = list(session.run(request))
        messages += [{"role": "assistant", "content": "".join(r.text for r in rounds)}]
        messages += [{"role": "user", "content": "Tell me more."}]
        longer = session.chat_request(messages, max_tokens=4, sampling=SamplingOptions())
        first = next(iter(session.run(longer)))
    assert first.cached >= len(request.prompt) + 15
    assert first.cached + (first.prefill_tokens or 0) == len(longer.prompt)


def test_an_interrupt_while_loading_is_kept_until_the_load_ends() -> None:
    reached = []

    def load() -> None:
        with native.deferred_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("end of the native call")

    with pytest.raises(KeyboardInterrupt):
        load()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
