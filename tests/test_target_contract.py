"""What the engine asks of a target, over both backends: the same tiny random model as a checkpoint and as a GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from dspark_cli.backends.base import (
    BadInput,
    ContextFull,
    Drafter,
    DsparkError,
    PairMismatch,
    Row,
    Target,
)
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.backends.standalone import StandaloneDrafter
from dspark_cli.backends.torch.target import TorchOptions, open_target
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Off, parse_policy
from dspark_cli.engine.text import TextStream
from tiny import END, HIDDEN, N_LAYER, N_VOCAB, tiny_checkpoint, tiny_gguf

BACKENDS = ("torch", "torch recorded", "llamacpp")
# float32 throughout; passes of other widths sum in another order. Logits are about 1 to 10.
ATOL = 2e-3

Open = Callable[..., Target]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {"torch": tiny_checkpoint(folder / "checkpoint"), "llamacpp": tiny_gguf(folder / "tiny.gguf")}


@pytest.fixture(scope="module", params=BACKENDS)
def opener(request: pytest.FixtureRequest, files: dict[str, Path]) -> Open:
    """Opens the tiny model in one backend."""
    backend = request.param

    def open_it(*, ctx: int | None = 512, n_seq: int = 3) -> Target:
        if backend == "llamacpp":
            return LlamaCppTarget(
                files["llamacpp"], ContextOptions(ctx=ctx, n_seq=n_seq, threads=1, kv_type="f32", flash_attn="off")
            )
        target = open_target(files["torch"], TorchOptions(ctx=ctx, n_seq=n_seq, threads=1, capture="off"))
        if backend == "torch recorded":
            record_without_a_device(target)
        return target

    return open_it


def record_without_a_device(target: Target) -> None:
    """Padding to buckets and fixed buffers as on a GPU; the "recording" runs the pass again."""
    from dspark_cli.backends.torch.capture import Recorder

    target._recorder = Recorder(target.network, target.cache, target.info.n_seq, lambda run: run)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def shared(opener: Open) -> Iterator[Target]:
    with opener() as target:
        yield target


@pytest.fixture
def target(shared: Target) -> Iterator[Target]:
    yield shared
    shared.request_features(())
    for seq in range(shared.info.n_seq):
        shared.drop(seq)


@pytest.fixture
def text(target: Target) -> list[int]:
    return target.tokenizer.encode("The quick brown fox jumps over the lazy dog and runs into the dark forest.")


def logits(target: Target, seq: int, tokens: list[int], n_logits: int | None = None) -> np.ndarray:
    return target.step([Row(seq, tokens, n_logits)])[0].logits.copy()


def test_what_it_says_of_itself(target: Target) -> None:
    info = target.info
    assert (info.n_vocab, info.n_embd, info.n_layer, info.n_ctx, info.n_seq) == (N_VOCAB, HIDDEN, N_LAYER, 512, 3)
    assert info.format in ("F32", "ALL_F32")
    assert info.device == "cpu"
    assert target.tokenizer.n_vocab == N_VOCAB
    assert END in target.tokenizer.eog_ids


def test_chunks_equal_one_pass(target: Target, text: list[int]) -> None:
    whole = logits(target, 0, text)
    assert whole.shape == (len(text), N_VOCAB)
    assert whole.dtype == np.float32
    parts = [logits(target, 1, text[i : i + 7]) for i in range(0, len(text), 7)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=ATOL)
    assert target.length(0) == target.length(1) == len(text)


def test_only_the_logits_asked_for(target: Target, text: list[int]) -> None:
    whole = logits(target, 0, text)
    outputs = target.step([Row(1, text[:20], 0), Row(2, text, 3)])
    assert outputs[0].logits.shape == (0, N_VOCAB)
    np.testing.assert_allclose(outputs[1].logits, whole[-3:], atol=ATOL)


def test_ragged_rows_equal_each_alone(target: Target, text: list[int]) -> None:
    """Other lengths behind them, other widths, in any order of sequences."""
    pieces, more = [text[:9], text[3:20], text[10:12]], [text[30:31], text[31:36], text[36:39]]
    alone = []
    for first, second in zip(pieces, more, strict=True):
        target.step([Row(0, first, 0)])
        alone.append(logits(target, 0, second))
        target.drop(0)
    target.step([Row(seq, piece, 0) for seq, piece in enumerate(pieces)])
    together = [output.logits.copy() for output in target.step([Row(seq, more[seq]) for seq in (2, 0)])]
    for seq, found in zip((2, 0, 1), [*together, logits(target, 1, more[1])], strict=True):
        np.testing.assert_allclose(found, alone[seq], atol=ATOL)
    assert [target.length(seq) for seq in range(3)] == [10, 22, 5]


def test_rewind_is_as_if_never_seen(target: Target, text: list[int]) -> None:
    target.step([Row(0, text[:10])])
    fresh = logits(target, 0, text[10:14])
    target.rewind(0, 10)
    target.step([Row(0, text[20:30])])
    target.rewind(0, 10)
    assert target.length(0) == 10
    np.testing.assert_allclose(logits(target, 0, text[10:14]), fresh, atol=ATOL)
    target.drop(0)
    assert target.length(0) == 0


def test_fork_shares_the_prefix_and_nothing_after(target: Target, text: list[int]) -> None:
    target.step([Row(0, text[:12])])
    target.step([Row(2, text[20:40])])  # what was there before is gone
    target.fork(0, 2, 8)
    assert target.length(2) == 8
    forked = logits(target, 2, text[30:34])
    target.rewind(0, 8)
    np.testing.assert_allclose(forked, logits(target, 0, text[30:34]), atol=ATOL)
    target.fork(0, 1)
    assert target.length(1) == target.length(0) == 12


def test_features_belong_to_their_tokens(target: Target, text: list[int]) -> None:
    target.request_features((-1, 0, 3))
    whole = target.step([Row(0, text[:20], 0)])[0].features
    assert whole is not None
    assert whole.shape == (20, 3 * HIDDEN)
    whole = whole.copy()
    singles = np.concatenate([target.step([Row(1, [t])])[0].features.copy() for t in text[:20]])  # type: ignore[union-attr]
    np.testing.assert_allclose(singles, whole, atol=ATOL)
    target.request_features((3, -1))  # in the order asked for
    turned = target.step([Row(2, text[:5], 0)])[0].features
    assert turned is not None
    np.testing.assert_allclose(turned, np.hstack([whole[:5, 2 * HIDDEN :], whole[:5, :HIDDEN]]), atol=ATOL)
    target.drop(2)
    target.request_features((3,))
    together = target.step([Row(2, text[:5]), Row(0, text[20:22])])
    np.testing.assert_allclose(together[0].features, whole[:5, 2 * HIDDEN :], atol=ATOL)
    assert together[1].features is not None
    assert together[1].features.shape == (2, HIDDEN)
    target.request_features(())
    assert target.step([Row(2, text[5:6])])[0].features is None


@pytest.mark.parametrize("layer", [-2, N_LAYER, 99])
def test_layers_that_do_not_exist(target: Target, layer: int) -> None:
    with pytest.raises(PairMismatch, match=f"layer {layer}"):
        target.request_features((1, layer))


def test_final_hidden_states(target: Target, text: list[int]) -> None:
    plain = target.step([Row(0, text[:6], 2)])[0]
    assert plain.hidden is None
    target.request_hidden(True)  # type: ignore[attr-defined]
    try:
        states = target.step([Row(1, text[:6], 2)])[0].hidden
    finally:
        target.request_hidden(False)  # type: ignore[attr-defined]
    assert states is not None
    assert states.shape == (2, HIDDEN)


def test_the_tokenizer_keeps_odd_text(target: Target) -> None:
    tokenizer = target.tokenizer
    for sample in ("naïve 😀 日本語 \x07 tab\t\n\n  two  spaces", "Ω≈ç√∫ 👩‍👩‍👧 🏳️‍🌈", "", " ", "<|im_end|>"):
        ids = tokenizer.encode(sample)
        assert tokenizer.decode(ids) == sample
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(pieces) == sample
        assert not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.encode("<|im_end|>", special=True) == [END]
    assert len(tokenizer.encode("<|im_end|>")) == len("<|im_end|>")
    assert tokenizer.token_bytes(END) == b""
    tokenizer.encode("a lone \ud83d surrogate")


def test_the_chat_template_is_the_models(target: Target) -> None:
    prompt = target.render_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(DsparkError, match="refuses the conversation"):
        target.render_chat([{"role": "wizard", "content": "Hi"}])


def test_the_context_is_used_to_its_end_and_not_beyond(opener: Open) -> None:
    with opener(ctx=256, n_seq=1) as small:
        tokens = [5] * 256
        small.step([Row(0, tokens[:250], 0)])
        small.step([Row(0, tokens[250:])])
        with pytest.raises(ContextFull):
            small.step([Row(0, [5])])


def test_a_context_longer_than_the_model_was_trained_on(opener: Open) -> None:
    with pytest.raises(BadInput, match=r"9999 is more than the 512"):
        opener(ctx=9999)


def test_closing_twice_is_harmless(opener: Open) -> None:
    small = opener(n_seq=1)
    small.close()
    small.close()


@pytest.mark.parametrize("policy", ["fixed:1", "fixed:4", "threshold:0.2", "auto"])
@pytest.mark.parametrize("kind", ["lookup", "small"])
def test_the_engine_gives_the_text_of_plain_decoding(opener: Open, target: Target, policy: str, kind: str) -> None:
    prompts = [target.tokenizer.encode(t) for t in ("one two three one two", "aaaaaaaa", "Say it again: say it")]
    requests = [Request(prompt, 24, id=i) for i, prompt in enumerate(prompts)]

    def answers(drafter: Drafter | None, schedule: object) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {request.id: [] for request in requests}
        for item in Engine(target, drafter, schedule).run(requests):  # type: ignore[arg-type]
            found[item.request] += item.tokens
        return found

    plain = answers(None, Off())
    if kind == "lookup":
        assert answers(LookupDrafter(), parse_policy(policy)) == plain
        return
    with (
        opener() as small
    ):  # drafts with itself: everything is accepted, so rewinds and bonus tokens meet at every length
        drafter = CombinedDrafter(StandaloneDrafter(small, n_vocab=N_VOCAB))
        assert answers(drafter, parse_policy(policy)) == plain


def test_sampling_with_a_seed_gives_the_text_of_plain_decoding(target: Target) -> None:
    prompt = target.tokenizer.encode("once upon once upon once")
    request = Request(prompt, 24, SamplingOptions(temperature=1.0, seed=7))
    plain, drafted = (
        [t for r in Engine(target, drafter, schedule).run([request]) for t in r.tokens]
        for drafter, schedule in ((None, Off()), (LookupDrafter(), parse_policy("fixed:4")))
    )
    assert drafted == plain
