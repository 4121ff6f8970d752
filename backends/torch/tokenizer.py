"""A checkpoint's own tokenizer and chat template, through transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dspark_cli.backends.base import DsparkError, Tokenizer
from dspark_cli.backends.pairing import PADDING
from dspark_cli.backends.torch.config import BadCheckpoint

SPACE = "▁"  # SentencePiece writes a space so


def open_tokenizer(folder: Path, n_vocab: int, eos: Iterable[int]) -> HfTokenizer:
    """The tokenizer in `folder`; eos: what config and generation config call end tokens. Raises BadCheckpoint."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        if _has_code(folder):
            raise BadCheckpoint(
                f"the tokenizer of {folder} needs code that comes with it (auto_map); dspark never runs code from a model",
                hint="a GGUF of it",
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(f"the tokenizer of {folder} cannot be loaded: {reason}", hint="download it again") from None
    if not getattr(tokenizer, "is_fast", False):
        raise BadCheckpoint(f"{folder} has no tokenizer.json (only {type(tokenizer).__name__} reads its vocabulary)")
    return HfTokenizer(tokenizer, n_vocab, eos)


def _has_code(folder: Path) -> bool:
    """Whether its tokenizer is a class that the folder brings along."""
    try:
        return "auto_map" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


class HfTokenizer(Tokenizer):
    """A fast tokenizer of transformers. Ids that only pad the vocabulary have no text."""

    def __init__(self, tokenizer: Any, n_vocab: int, eos: Iterable[int]) -> None:
        self.inner = tokenizer
        self.n_vocab = n_vocab
        self.bos_id = tokenizer.bos_token_id
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eog_ids = frozenset(token for token in (*own, *eos) if 0 <= token < n_vocab)
        self._added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins a text with the BOS token."""
        with_it, without = (self.inner("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
        return self.bos_id is not None and with_it[:1] == [self.bos_id] != without[:1]

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        clean = text.encode("utf-8", errors="replace").decode("utf-8")  # a lone surrogate has no bytes
        ids = self.inner(clean, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else list(ids)

    def token_bytes(self, token: int) -> bytes:
        cached = self._bytes.get(token)
        if cached is None:
            cached = self._bytes[token] = self._piece(token)
        return cached

    def _piece(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else str(added.content).encode()
        text = self.inner.convert_ids_to_tokens(token) if 0 <= token < len(self.inner) else None
        if text is None:
            return b""
        return _byte_level(text) if self._is_byte_level else _sentencepiece(text)

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's alphabet of bytes (else with SentencePiece's marks)."""
        described = json.loads(self.inner.backend_tokenizer.to_str())
        return any(step["type"] == "ByteLevel" for step in _steps(described.get("decoder")))


def difference_between(mine: Tokenizer, other: Tokenizer) -> str:
    """What two vocabularies differ in; "" when every id that both have is the same token."""
    if abs(mine.n_vocab - other.n_vocab) > PADDING:
        return f"vocabulary of {mine.n_vocab} tokens, the target has {other.n_vocab}"
    for token in range(min(mine.n_vocab, other.n_vocab)):
        here, there = mine.token_bytes(token), other.token_bytes(token)
        if here != there:
            return f"token {token} is {here!r}, in the target {there!r}"
    if mine.eog_ids != other.eog_ids:
        return f"its answers end with tokens {sorted(mine.eog_ids)}, the target's with {sorted(other.eog_ids)}"
    return ""


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder, flat."""
    if decoder is None:
        return []
    inner = decoder.get("decoders") or []
    return [step for part in inner for step in _steps(part)] if inner else [decoder]


def _alphabet() -> dict[str, int]:
    """GPT-2's letter -> byte: printable bytes stand for themselves, the others for letters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


ALPHABET = _alphabet()


def _byte_level(text: str) -> bytes:
    if all(letter in ALPHABET for letter in text):
        return bytes(ALPHABET[letter] for letter in text)
    return text.encode()


def _sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(SPACE, " ").encode()


def render_chat(tokenizer: HfTokenizer, messages: Sequence[dict[str, str]], thinking: bool | None, name: str) -> str:
    """Prompt text through the checkpoint's template (transformers runs it in a sandbox), without a BOS added twice."""
    from jinja2 import TemplateError

    if not tokenizer.inner.chat_template:
        raise DsparkError(f"{name} has no chat template", hint="dspark generate MODEL --raw PROMPT")
    options = {} if thinking is None else {"enable_thinking": thinking}
    try:
        text: str = tokenizer.inner.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **options
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DsparkError(f"the chat template of {name} refuses the conversation: {error}") from None
    bos = tokenizer.inner.bos_token
    return text.removeprefix(bos) if tokenizer.adds_bos and bos else text
