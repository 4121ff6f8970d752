"""Tokenizers written in SentencePiece's marks (Gemma, Llama 2): bytes of tokens, BOS, templates that write BOS themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dspark_cli.backends.torch.tokenizer import HfTokenizer, difference_between, open_tokenizer, render_chat  # noqa: E402
from dspark_cli.engine.text import TextStream  # noqa: E402

WORDS = ["<pad>", "<bos>", "<eos>", "<end_of_turn>", "<tool>", *(f"<0x{i:02X}>" for i in range(256))]
PIECES = ["▁", "h", "i", "▁h", "▁hi", "t", "e", "r", "▁t"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}{{ '!' if enable_thinking }}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> HfTokenizer:
    """As Gemma's: marks for spaces, bytes for unknown letters, BOS in front; `<tool>` is added, but no control token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocabulary = {word: i for i, word in enumerate([*WORDS, *PIECES])}
    inner = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("▁", "h"), ("▁h", "i"), ("▁", "t")],
            byte_fallback=True,
            unk_token=None,
            fuse_unk=True,
        )
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS[:4]])
    inner.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    whole.chat_template = TEMPLATE
    whole.save_pretrained(tmp_path)
    return open_tokenizer(tmp_path, len(vocabulary) + 6, eos=[2, 3, 999])


def test_text_survives_token_by_token(tokenizer: HfTokenizer) -> None:
    for text in ("hi there hi", " hi", "naïve 😀 hi\n", "a<end_of_turn>b", "  "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = TextStream(tokenizer)
        assert "".join([stream.push(token) for token in ids]) + stream.flush() == text


def test_control_tokens_only_where_they_are_asked_for(tokenizer: HfTokenizer) -> None:
    assert tokenizer.encode("hi<end_of_turn>", special=True)[-1] == 3
    assert 3 not in tokenizer.encode("hi<end_of_turn>")
    assert tokenizer.token_bytes(3) == b""
    assert tokenizer.token_bytes(4) == b"<tool>", "added, but part of the text"
    assert tokenizer.token_bytes(len(WORDS) + len(PIECES) + 2) == b"", "an id that only pads the vocabulary"
    assert tokenizer.eog_ids == {2, 3}


def test_bos_is_written_once(tokenizer: HfTokenizer) -> None:
    assert tokenizer.adds_bos
    assert tokenizer.encode("hi", bos=True) == [1, *tokenizer.encode("hi")]
    prompt = render_chat(tokenizer, [{"role": "user", "content": "hi"}], None, "model")
    assert prompt == "hi<end_of_turn>"
    ids = tokenizer.encode(prompt, special=True, bos=True)
    assert (ids[0], ids[-1], ids.count(1)) == (1, 3, 1)


def test_thinking_reaches_the_template(tokenizer: HfTokenizer) -> None:
    message = [{"role": "user", "content": "hi"}]
    assert render_chat(tokenizer, message, True, "model").endswith("!")
    assert not render_chat(tokenizer, message, False, "model").endswith("!")


def test_vocabularies_that_differ(tokenizer: HfTokenizer) -> None:
    assert difference_between(tokenizer, HfTokenizer(tokenizer.inner, tokenizer.n_vocab, [2, 3])) == ""
    padded = HfTokenizer(tokenizer.inner, tokenizer.n_vocab + 100, [2, 3])
    assert difference_between(tokenizer, padded) == "", "sizes may differ by padding"
    wide = HfTokenizer(tokenizer.inner, tokenizer.n_vocab + 5000, [2, 3])
    assert "vocabulary of 276 tokens" in difference_between(tokenizer, wide)
    other = HfTokenizer(tokenizer.inner, tokenizer.n_vocab, [2])
    assert "answers end with tokens [2, 3]" in difference_between(tokenizer, other)
