"""Streaming: whole characters, stop strings never shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspark_cli.backends.base import Tokenizer
from dspark_cli.engine.text import TextStream


class Bytes(Tokenizer):
    """Token i is byte i."""

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@given(st.text())
def test_characters_arrive_whole(text: str) -> None:
    stream = TextStream(Bytes())
    pieces = [stream.push(b) for b in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    assert all("�" not in p or "�" in text for p in pieces)


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(Bytes(), stops)
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped:
            break
    shown += stream.flush()
    # The stream stops as soon as any stop string is complete, and shows nothing of the one that begins first then.
    seen = next((text[:n] for n in range(1, len(text) + 1) if any(s in text[:n] for s in stops)), None)
    assert stream.stopped == (seen is not None)
    assert shown == (text if seen is None else seen[: min(seen.find(s) for s in stops if s in seen)])


def test_a_broken_character_at_the_end_is_marked() -> None:
    stream = TextStream(Bytes())
    assert stream.push(0xE2) == ""
    assert stream.flush() == "�"
