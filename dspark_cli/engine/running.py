"""A request on its way: first its prompt is computed, chunk by chunk, then it is decoded, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_cli.backends.base import DraftRequest, Tokenizer
from dspark_cli.engine.rounds import FinishReason, Request
from dspark_cli.engine.sampling import Sampler
from dspark_cli.engine.text import TextStream


@dataclass
class Running:
    """A request in sequence `seq`.

    filled:     tokens of the prompt that are in the cache;  cached: how many of them were there at the start
    leader:     whose prompt begins the same way and is being computed: until it has `shared` tokens, this one waits
    anchor:     the last committed token, not yet in any cache; only meaningful once the prompt is complete
    prefill_ms: what the prompt has cost so far
    """

    request: Request
    seq: int
    prompt: list[int]
    tokenizer: Tokenizer
    filled: int = 0
    cached: int = 0
    leader: Running | None = None
    shared: int = 0
    anchor: int = 0
    produced: int = 0
    prefill_ms: float = 0.0
    finish: FinishReason | None = None
    sampler: Sampler = field(init=False)
    stream: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request.sampling, self.prompt)
        self.stream = TextStream(self.tokenizer, self.request.stop)

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.filled == len(self.prompt)

    def draft_request(self, block: int) -> DraftRequest:
        choose = self.sampler.choose_draft if self.sampler.chooses_drafts else None
        return DraftRequest(self.seq, self.anchor, block, choose)

    def trim(self, tokens: Sequence[int], room: int) -> tuple[list[int], str]:
        """The tokens up to the first that ends the answer, and the text they add; sets `finish`.

        `room`: tokens the context still takes.
        """
        kept: list[int] = []
        text = ""
        limit = self.request.max_tokens
        for token in tokens:
            kept.append(token)
            self.produced += 1
            if token in self.request.stop_ids:
                self.finish = "stop"
            else:
                text += self.stream.push(token)
                if self.stream.stopped:
                    self.finish = "stop"
                elif limit is not None and self.produced >= limit:
                    self.finish = "length"
                elif len(kept) >= room:
                    self.finish = "context"
            if self.finish:
                text += self.stream.flush()
                break
        self.sampler.commit(kept)
        return kept, text
