"""Which part of an answer's text came from where: drafted and accepted, corrected by the target, or the target's own."""

from __future__ import annotations

import codecs
from typing import Literal

from dspark_cli.backends.base import Tokenizer
from dspark_cli.engine.rounds import Round

Kind = Literal["accepted", "corrected", "plain"]


class Spans:
    """A reader of rounds: `runs` is the text so far as (kind, text), neighbours of one kind joined.

    accepted:  a drafted token that the target kept
    corrected: the target's token in place of a drafted one that it refused
    plain:     the target's own: nothing was verified there, or the whole draft was right and this is the extra token

    A character that several tokens make up belongs to the one that completes it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.runs: list[tuple[Kind, str]] = []
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, item: Round) -> None:
        for position, token in enumerate(item.tokens):
            if position < item.accepted:
                kind: Kind = "accepted"
            else:
                kind = "corrected" if item.accepted < item.verified else "plain"
            self._append(kind, self._decoder.decode(self._tokenizer.token_bytes(token)))
        if item.finish:
            self._append("plain", self._decoder.decode(b"", final=True))

    def _append(self, kind: Kind, text: str) -> None:
        if not text:
            return
        if self.runs and self.runs[-1][0] == kind:
            self.runs[-1] = (kind, self.runs[-1][1] + text)
        else:
            self.runs.append((kind, text))
