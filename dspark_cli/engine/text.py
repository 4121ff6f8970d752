"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from dspark_cli.backends.base import Tokenizer


class TextStream:
    """Feed it tokens one by one; it gives the text that is safe to show and says when a stop string is complete."""

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text made certain by `token`; sets `stopped` when it completes a stop string."""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        return self._release()

    def flush(self) -> str:
        """What is still held at the end: a broken character becomes U+FFFD, the start of a stop string is text after all."""
        self._held += self._decoder.decode(b"", final=True)
        text = self._release()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        if self.stopped:
            return ""
        ends = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        keep = max((self._overlap(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that could begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
