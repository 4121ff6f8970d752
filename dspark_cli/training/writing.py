"""The target writes its own training texts: both turns of a dialogue, at mixed temperatures.

The user turn is opened with the target's template and a few first words, and the target goes on with it; then the
answer. A drafter must follow the target where the target goes, so its own text is the best there is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_cli.backends.base import Target
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.training.documents import Document

SAMPLED = 1.0  # temperature of user turns
MARK = "\x1d"  # stands for a message while the template is taken apart
#: temperatures of the answers: half of them greedy, as most people run small models for facts and code
TEMPERATURES = (0.0, 0.0, 0.0, 0.5, 0.8, 1.0)


@dataclass(frozen=True)
class Frame:
    """The target's chat template, cut at the message: prefix, message, suffix, answer. Token ids."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, target: Target) -> Frame:
        text = target.render_chat([{"role": "user", "content": MARK}])
        before, _, after = text.partition(MARK)
        encode = target.tokenizer.encode
        return cls(
            tuple(encode(before, special=True, bos=True)), tuple(encode(after, special=True)), target.tokenizer.eog_ids
        )


@dataclass(frozen=True)
class WritingOptions:
    """user_tokens, answer_tokens: the longest turns;  top_k: of the sampled tokens;  seed: of the openings and the draws."""

    user_tokens: int = 70
    answer_tokens: int = 240
    top_k: int = 64
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of a dialogue at most, with room for the template."""
        return self.user_tokens + self.answer_tokens + 256


def openings(target: Target, seed: int) -> Iterator[list[int]]:
    """First words of user turns, for ever: a third is left to the target altogether."""
    generator = np.random.default_rng(seed)
    words = [target.tokenizer.encode(text) for text in OPENINGS]
    while True:
        yield [] if generator.random() < 0.3 else words[int(generator.integers(len(words)))]


@dataclass
class _Row:
    """One dialogue being written: what must come next, then what the target makes of it."""

    begin: int
    temperature: float
    forced: list[int]
    ids: list[int] = field(default_factory=list)
    answer_start: int = 0  # 0: still in the user turn
    turn_start: int = 0


class BatchWriter:
    """Writes `rows` dialogues at once with a torch copy of the target; a finished one makes room for the next."""

    def __init__(
        self, model: object, frame: Frame, first_words: Iterator[Sequence[int]], options: WritingOptions, rows: int
    ):
        import torch

        from dspark_cli.backends.torch.gguf_model import Columns, GgufModel

        assert isinstance(model, GgufModel)
        self._model, self._frame, self._words, self._options = model, frame, first_words, options
        self._columns = Columns(model, rows, options.longest)
        self._random = np.random.default_rng([options.seed, 1])
        self._draws = torch.Generator(self._columns.device).manual_seed(options.seed)
        self._rows = [self._new(0) for _ in range(rows)]

    def _new(self, begin: int) -> _Row:
        words = list(next(self._words))
        forced = [*self._frame.prefix, *words]
        temperature = TEMPERATURES[int(self._random.integers(len(TEMPERATURES)))]
        return _Row(begin, temperature, forced, turn_start=len(self._frame.prefix))

    def documents(self) -> Iterator[Document]:
        """Dialogues as they are finished, for ever."""
        import torch

        last = np.zeros(len(self._rows), dtype=np.int64)
        drawn = last
        while True:
            for i, row in enumerate(self._rows):
                token = row.forced.pop(0) if row.forced else int(drawn[i])
                finished = self._take(row, token)
                if finished is not None:
                    yield finished
                    row = self._rows[i] = self._new(self._columns.column)
                    self._columns.begins[i] = self._columns.column
                    token = row.forced.pop(0)
                    self._take(row, token)
                last[i] = token
            with torch.inference_mode():
                hidden = self._columns.step(torch.from_numpy(last))
                drawn = self._draw(hidden)

    def _take(self, row: _Row, token: int) -> Document | None:
        """Add `token` to the row; the document if that ends its answer."""
        options, frame = self._options, self._frame
        row.ids.append(token)
        if row.forced:
            return None
        length = len(row.ids) - row.turn_start
        if not row.answer_start:
            if token in frame.ends or length >= options.user_tokens:
                if token in frame.ends:
                    row.ids.pop()  # the suffix brings it
                row.forced = list(frame.suffix)
                if token in frame.ends:
                    row.ids.append(row.forced.pop(0))
                row.answer_start = row.turn_start = len(row.ids) + len(row.forced)
            return None
        if token in frame.ends or length >= options.answer_tokens:
            return Document(tuple(row.ids), row.answer_start, row.temperature)
        return None

    def _draw(self, hidden: object) -> np.ndarray:
        import torch

        logits = self._model.lm_head(hidden).float()
        device = logits.device
        best, ids = logits.topk(self._options.top_k, dim=-1)
        heat = torch.tensor([row.temperature if row.answer_start else SAMPLED for row in self._rows], device=device)
        noise = -torch.empty_like(best).exponential_(generator=self._draws).log()
        chosen = (best / heat.clamp(min=1e-4).unsqueeze(1) + noise).argmax(dim=-1, keepdim=True)
        return ids.gather(1, chosen)[:, 0].cpu().numpy()


class EngineWriter:
    """The same with the decode loop that serves users, on the very file; slower where torch has quick matrix products."""

    def __init__(
        self, target: Target, frame: Frame, first_words: Iterator[Sequence[int]], options: WritingOptions
    ) -> None:
        self._target, self._frame, self._words, self._options = target, frame, first_words, options
        self._random = np.random.default_rng([options.seed, 1])
        self._numbers = itertools.count()
        self._asked: deque[Request] = deque()  # answers wanted for user turns that are written
        self._open: dict[int, tuple[Request, list[int]]] = {}

    def documents(self) -> Iterator[Document]:
        """Dialogues as they are finished, for ever."""
        for item in Engine(self._target).run(self._requests()):
            request, ids = self._open[item.request]
            ids += item.tokens
            if item.finish:
                del self._open[item.request]
                finished = self._finish(request, ids)
                if finished is not None:
                    yield finished

    def _requests(self) -> Iterator[Request]:
        while True:
            request = self._asked.popleft() if self._asked else self._user_turn()
            self._open[request.id] = (request, [])
            yield request

    def _user_turn(self) -> Request:
        words = next(self._words)
        return self._request([*self._frame.prefix, *words], self._options.user_tokens, SAMPLED)

    def _request(self, prompt: list[int], tokens: int, temperature: float) -> Request:
        number = next(self._numbers)
        sampling = SamplingOptions(temperature=temperature, top_k=self._options.top_k, seed=self._options.seed + number)
        return Request(prompt, tokens, sampling, self._frame.ends, id=number)

    def _finish(self, request: Request, ids: list[int]) -> Document | None:
        """The document, if that was its answer; a user turn makes an answer wanted."""
        prompt, suffix = list(request.prompt), list(self._frame.suffix)
        if prompt[-len(suffix) :] == suffix:
            return Document((*prompt, *ids), len(prompt), request.sampling.temperature)
        if ids[-1] in self._frame.ends:
            ids.pop()
        temperature = TEMPERATURES[int(self._random.integers(len(TEMPERATURES)))]
        self._asked.append(self._request([*prompt, *ids, *suffix], self._options.answer_tokens, temperature))
        return None


OPENINGS = tuple(
    line.strip("\n")
    for line in """
What
What is the
How do I
How many
How does
Why
Why do
Who was
When did
Where is
Which
Can you explain
Can you write
Could you tell me
Please write
Write a
Write a short story about
Write a Python function that
Write a function in JavaScript
Write a poem about
Write a letter to
Write an email
Write three sentences about
Tell me about
Tell me a story about a
Explain
Explain how
Explain the difference between
Describe
Describe a
Give me
Give me a list of
Give an example of
List
List the steps to
List five
Name three
Summarize
Summarize the following
Translate
Compare
Define
Calculate
Compute
Solve
If
If I have
If a train travels
A
A man has
A farmer
A shop sells
There are
There were
Maria has
Tom buys
What is 15
What is the sum of
How much is
Convert
Find the
Implement
Create a
Create a class
def
```python
Fix this code
What does this code do
How can I sort
How do I read a file in
SELECT
Rewrite
Rewrite this sentence
Continue the story
Once upon a time
Imagine
You are
I am
I want to
I need
I have
My
Help me
Suggest
Recommend
Is
Is it true that
Are
Do
Does
Should I
In
In the year
The
The following
Make
Plan
Design
Generate
Classify
Correct
Prove that
Show me
Think of
Who is
Complete the
Choose
Turn this into
Identify
Hi
Hello
""".splitlines()
    if line.strip()
)
