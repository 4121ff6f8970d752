"""The decode loop: prefill, draft, choose how much to verify, verify, commit. One loop for R >= 1 sequences.

Everything that generates (chat, generate, batch, bench, the terminal UI) reads the `Round`s of `Engine.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from dspark_cli.backends.base import (
    EMPTY_DRAFT,
    BadInput,
    ContextFull,
    Draft,
    Drafter,
    DsparkError,
    FloatArray,
    Row,
    RowOutput,
    Target,
)
from dspark_cli.engine.clock import PassClock
from dspark_cli.engine.rounds import Request, Round, Times
from dspark_cli.engine.running import Running
from dspark_cli.engine.schedule import Off, Outcome, Schedule
from dspark_cli.engine.slots import Slots
from dspark_cli.engine.watching import Watched

PREFILL_CHUNK = 512  # prompt tokens per pass: bounds feature buffers, and Ctrl-C answers between chunks
#: prompt tokens in a pass that others decode in, by device: enough to use the machine, few enough that nobody stalls
BESIDE = {"cpu": 64}
BESIDE_GPU = 256  # never measured


class _Committed(NamedTuple):
    """One request's part of a pass.

    tokens: what it committed;  outcome: what became of its draft
    round:  makes its round, given what is only known when the pass is over
    """

    tokens: list[int]
    outcome: Outcome
    round: Callable[..., Round]


@dataclass
class Engine:
    """A target, maybe a drafter, and a schedule; remembers what each sequence's cache holds between runs.

    margins: also report, per committed token, by how much two logits had to change for another one.
    clock:   seconds, from any start
    on_prefill: is told, before each pass over a prompt, the tokens of it that are computed and all; may raise to stop
    """

    target: Target
    drafter: Drafter | None = None
    schedule: Schedule = field(default_factory=Off)
    margins: bool = False
    clock: Callable[[], float] = time.perf_counter
    on_prefill: Callable[[int, int], None] = lambda done, total: None
    _slots: Slots = field(default_factory=Slots)
    _watched: list[Watched] = field(default_factory=list)

    def run(self, requests: Iterable[Request], *, isolate: bool = False) -> Iterator[Round]:
        """Decode `requests`, as many at once as the target has sequences; yields rounds as they happen.

        The target's distribution is preserved exactly (see sampling.py). A request is taken from the iterable when a
        sequence is free for it; what its prompt shares with any sequence is not computed again.
        A prompt that cannot be served raises ContextFull or BadInput; with `isolate` it is one round with the `error`.
        """
        if self.drafter is not None:
            self.target.request_features(self.drafter.feature_layers)
        waiting = iter(requests)
        running: list[Running] = []
        try:
            while True:
                yield from self._admit(waiting, running, isolate)
                if not running:
                    return
                rounds = self._pass(running)
                running = [r for r in running if not r.finish]
                yield from rounds
        except GeneratorExit:
            raise
        except BaseException:
            # Interrupted inside a pass: caches of target and drafter may disagree, so nothing of them is reused.
            self._slots.tokens.clear()
            raise
        finally:
            self._end_watch()

    def forget(self) -> None:
        """Reuse nothing of the caches: somebody else wrote to them."""
        self._slots.tokens.clear()

    # -- one pass: a draft-verify cycle of those who decode, a chunk of the prompts of those who do not yet -------------

    def _pass(self, running: list[Running]) -> list[Round]:
        """Draft, choose, verify, commit; beside it, prompts move on."""
        target, schedule = self.target, self.schedule
        clock = PassClock(target, self.drafter, self.clock)
        decoding = [r for r in running if r.decoding]
        chunks = self._chunks(running, beside=len(decoding)) if len(decoding) < len(running) else []
        prompt_tokens = sum(len(chunk) for _, chunk in chunks)

        proposals = self._propose(decoding, target.max_rows - prompt_tokens)
        clock.lap("draft")
        lengths = schedule.choose(proposals) if decoding else []
        drafts = [draft.prefix(n) for draft, n in zip(proposals, lengths, strict=True)]
        self._watched += [Watched(decoding[i], proposals[i]) for i in schedule.watched()] if decoding else []

        rows = [Row(r.seq, [r.anchor, *d.tokens.tolist()]) for r, d in zip(decoding, drafts, strict=True)]
        rows += [Row(r.seq, chunk, int(r.filled + len(chunk) == len(r.prompt))) for r, chunk in chunks]
        for r, _ in chunks:
            self.on_prefill(r.filled, len(r.prompt))
        outputs = target.step(rows)
        clock.lap("verify")

        cycles = [
            self._commit(r, proposal, draft, output, clock)
            for r, proposal, draft, output in zip(decoding, proposals, drafts, outputs, strict=False)
        ]
        times, prompt_ms = clock.split(prompt_tokens / sum(len(row.tokens) for row in rows))
        rounds: list[Round] = []
        if decoding:
            # A pass with prompts in it says nothing about what verifying costs.
            schedule.observe([c.outcome for c in cycles], replace(times, verify=0.0) if chunks else times)
            self._watch(decoding, cycles)
            parked, shared = schedule.parked, len(decoding)
            rounds = [c.round(times=times, parked=parked, shared=shared, beside=prompt_tokens) for c in cycles]
        for (r, chunk), output in zip(chunks, outputs[len(decoding) :], strict=True):
            rounds += self._fill(r, chunk, output, prompt_ms * len(chunk) / prompt_tokens)
            if r.decoding:
                schedule.begin(sum(other.decoding for other in running))
        self._slots.join(target, self.drafter, running)
        return rounds

    def _commit(self, r: Running, proposal: Draft, draft: Draft, output: RowOutput, clock: PassClock) -> _Committed:
        """Judge one draft, take rejected positions out of the cache, tell the drafter what stays."""
        start = self.target.length(r.seq) - len(draft) - 1
        accepted, bonus = r.sampler.verify(output.logits, draft)
        outcome = judge(proposal, len(draft), accepted, bonus)
        anchor = r.anchor
        tokens, text = r.trim([*draft.tokens[:accepted].tolist(), bonus], self.target.info.n_ctx - start - 1)
        kept = min(accepted, len(tokens))
        r.anchor = tokens[-1]
        self.target.rewind(r.seq, start + 1 + kept)
        began = self.clock()
        self._observe(r.seq, [anchor, *tokens[:kept]], output)
        clock.injected(began)
        unfinished = partial(
            Round,
            request=r.request.id,
            tokens=tuple(tokens),
            text=text,
            drafted=len(proposal),
            verified=len(draft),
            accepted=kept,
            confidence=None if proposal.confidence is None else tuple(map(float, proposal.confidence)),
            source=proposal.source if len(proposal) else "",
            finish=r.finish,
            margins=self._margins_of(r, output.logits, len(tokens)),
        )
        return _Committed(tokens, outcome, unfinished)

    def _watch(self, decoding: Sequence[Running], cycles: Sequence[_Committed]) -> None:
        """Compare watched drafts with what was committed."""
        if not self._watched:
            return
        committed = {id(r): c.tokens for r, c in zip(decoding, cycles, strict=True)}
        for watched in self._watched:
            watched.read(committed.get(id(watched.request), ()))
        if not any(w.open for w in self._watched):
            self._end_watch()

    def _end_watch(self) -> None:
        """Tell the schedule what is known of the watched drafts."""
        if self._watched:
            watched, self._watched = self._watched, []
            self.schedule.seen([w.outcome for w in watched])

    def _propose(self, decoding: list[Running], rows: int) -> list[Draft]:
        """A draft per decoding request, within what its token limit, the context and the pass (`rows`) leave room for."""
        if not decoding:
            return []
        drafter, schedule = self.drafter, self.schedule
        share = schedule.limit(rows - len(decoding), len(decoding))
        longest = drafter.block_size if drafter is not None else 0
        limits = [max(0, min(longest, share, self._room(r))) for r in decoding]
        blocks = schedule.block(limits, sum(self.target.length(r.seq) for r in decoding) / len(decoding))
        if drafter is None or not any(blocks):
            return [EMPTY_DRAFT for _ in decoding]
        proposals = drafter.quick([r.draft_request(block) for r, block in zip(decoding, blocks, strict=True)])
        if drafter.has_pass:
            sizes = schedule.passes([min(block, drafter.pass_block) for block in blocks], proposals)
            asked = [i for i, size in enumerate(sizes) if size > 0]
            made = drafter.propose([decoding[i].draft_request(sizes[i]) for i in asked]) if asked else []
            for i, draft in zip(asked, made, strict=True):
                proposals[i] = draft
        return proposals

    def _room(self, r: Running) -> int:
        """Draft tokens that can still be committed: the bonus token takes one place of every limit."""
        room = self.target.info.n_ctx - self.target.length(r.seq) - 2
        if r.request.max_tokens is not None:
            room = min(room, r.request.max_tokens - r.produced - 1)
        return room

    def _observe(self, seq: int, tokens: list[int], output: RowOutput) -> None:
        """`tokens` stay in the target's cache: note it, and tell the drafter."""
        self._slots.tokens[seq] += tokens
        if self.drafter is None:
            return
        features = None if output.features is None else output.features[: len(tokens)]
        self.drafter.observe(seq, tokens, features)

    def _margins_of(self, r: Running, logits: FloatArray, count: int) -> tuple[float, ...] | None:
        if not self.margins:
            return None
        return margins(logits[:count]) if r.request.sampling.greedy else tuple(r.sampler.gaps[:count]) or None

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _admit(self, waiting: Iterator[Request], running: list[Running], isolate: bool) -> Iterator[Round]:
        """Give every free sequence a request, as long as there are any; yields the refusals."""
        if len(running) == self.target.info.n_seq:
            return
        free = sorted(set(range(self.target.info.n_seq)) - {r.seq for r in running})
        while free and (request := next(waiting, None)) is not None:
            problem = self._problem(request)
            if problem is None:
                new = Running(request, free[0], list(request.prompt), self.target.tokenizer)
                self._slots.place(self.target, self.drafter, new, free, running)
                free.remove(new.seq)
                running.append(new)
            elif isolate:
                yield Round(request.id, (), finish="error", error=problem)
            else:
                raise problem

    def _problem(self, request: Request) -> DsparkError | None:
        """Why a request cannot be served; None if it can."""
        size, n_ctx = len(request.prompt), self.target.info.n_ctx
        if not size:
            return BadInput("the prompt is empty: there is nothing to continue")
        if size >= n_ctx:
            return ContextFull(f"the prompt has {size} tokens, the context holds {n_ctx}", hint=f"--ctx {size + 512}")
        return None

    def _chunks(self, running: list[Running], beside: int) -> list[tuple[Running, list[int]]]:
        """Prompt tokens to compute in this pass, first come first served; `beside`: requests that decode in it."""
        left = min(PREFILL_CHUNK, self.target.max_rows)
        if beside:
            left = max(1, min(BESIDE.get(self.target.info.device, BESIDE_GPU), self.target.max_rows - 2 * beside))
        chunks = []
        for r in running:
            chunk = r.prompt[r.filled : r.filled + left] if r.leader is None and left > 0 else []
            if chunk:
                chunks.append((r, chunk))
                left -= len(chunk)
        return chunks

    def _fill(self, r: Running, chunk: list[int], output: RowOutput, ms: float) -> list[Round]:
        """A chunk of a prompt is computed; after the last one the first token is drawn, and that is a round."""
        began = self.clock()
        self._observe(r.seq, chunk, output)
        r.filled += len(chunk)
        r.prefill_ms += ms + (self.clock() - began) * 1e3
        if not r.decoding:
            return []
        tokens, text = r.trim([r.sampler.first(output.logits[-1])], self.target.info.n_ctx - len(r.prompt))
        r.anchor = tokens[-1]
        return [
            Round(
                request=r.request.id,
                tokens=tuple(tokens),
                text=text,
                times=Times(verify=r.prefill_ms),
                finish=r.finish,
                prefill_tokens=len(r.prompt) - r.cached,
                cached=r.cached,
                margins=self._margins_of(r, output.logits[-1:], 1),
            )
        ]


def judge(proposal: Draft, verified: int, accepted: int, bonus: int) -> Outcome:
    """What is known of a proposal after its round.

    The bonus token follows an accepted prefix: if that ends before the (deterministic) proposal does, it tells for free
    whether the next token would have been kept. A sampled one would be kept by another rule: nothing is known of it.
    """
    judged, kept = verified, accepted
    if accepted == verified < len(proposal) and proposal.probs is None:
        judged, kept = verified + 1, accepted + (int(proposal.tokens[verified]) == bonus)
    return Outcome(proposal, verified, accepted, judged, kept)


def margins(logits: FloatArray) -> tuple[float, ...]:
    """First minus second logit of each row of [n, V]."""
    found = []
    for row in logits:
        best = int(row.argmax())
        second = max(row[:best].max(initial=-np.inf), row[best + 1 :].max(initial=-np.inf))
        found.append(float(row[best] - second))
    return tuple(found)
