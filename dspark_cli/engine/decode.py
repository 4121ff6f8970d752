"""The decode loop: prefill, draft, choose how much to verify, verify, commit. One loop for R >= 1 sequences.

Everything that generates (chat, generate, batch, bench, the terminal UI) reads the `Round`s of `Engine.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean

import numpy as np

from dspark_cli.backends.base import (
    EMPTY_DRAFT,
    BadInput,
    ContextFull,
    Draft,
    Drafter,
    DraftRequest,
    FloatArray,
    Row,
    RowOutput,
    Target,
)
from dspark_cli.backends.standalone import common_prefix
from dspark_cli.engine.rounds import FinishReason, Request, Round, Times
from dspark_cli.engine.sampling import Sampler
from dspark_cli.engine.schedule import Off, Outcome, Schedule
from dspark_cli.engine.text import TextStream

PREFILL_CHUNK = 512  # tokens per prefill pass: bounds feature buffers, and Ctrl-C answers between chunks


@dataclass
class _Active:
    """A request that is being decoded in sequence `seq`. `anchor` is committed but not yet in any cache."""

    request: Request
    seq: int
    sampler: Sampler
    stream: TextStream
    anchor: int = 0
    produced: int = 0
    finish: FinishReason | None = None

    def draft_request(self, block: int) -> DraftRequest:
        choose = self.sampler.choose_draft if self.sampler.samples_drafts else None
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


@dataclass
class Engine:
    """A target, maybe a drafter, and a schedule; remembers what each sequence's cache holds between runs.

    margins: also report, per committed token, the gap between the first and second logit (greedy only).
    clock:   seconds, from any start
    on_prefill: is told, before each pass over a prompt, the tokens of it that are computed and all; may raise to stop
    """

    target: Target
    drafter: Drafter | None = None
    schedule: Schedule = field(default_factory=Off)
    margins: bool = False
    clock: Callable[[], float] = time.perf_counter
    on_prefill: Callable[[int, int], None] = lambda done, total: None
    _cached: dict[int, list[int]] = field(default_factory=dict)

    def run(self, requests: Iterable[Request]) -> Iterator[Round]:
        """Decode `requests`, as many at once as the target has sequences; yields rounds as they happen.

        The target's distribution is preserved exactly (see sampling.py). A request whose prompt begins with what a free
        sequence has cached continues there. Raises ContextFull or BadInput for a prompt that cannot be served.
        """
        if self.drafter is not None:
            self.target.request_features(self.drafter.feature_layers)
        waiting = iter(requests)
        active: list[_Active] = []
        try:
            while True:
                free = [s for s in range(self.target.info.n_seq) if s not in {a.seq for a in active}]
                for request in islice(waiting, len(free)):
                    started, first = self._prefill(request, free)
                    free.remove(started.seq)
                    yield first
                    if not started.finish:
                        active.append(started)
                if not active:
                    return
                rounds = self._round(active)
                active = [a for a in active if not a.finish]
                yield from rounds
        except GeneratorExit:
            raise
        except BaseException:
            # Interrupted inside a pass: caches of target and drafter may disagree, so nothing of them is reused.
            self._cached.clear()
            raise

    def forget(self) -> None:
        """Reuse nothing of the caches: somebody else wrote to them."""
        self._cached.clear()

    # -- one draft-verify cycle ----------------------------------------------------------------------------------

    def _round(self, active: list[_Active]) -> list[Round]:
        """Draft, choose, verify, commit: one cycle of all active requests."""
        target, schedule = self.target, self.schedule
        clock = _Clock(self)

        proposals = self._propose(active)
        clock.lap("draft")
        drafts = [draft.prefix(n) for draft, n in zip(proposals, schedule.choose(proposals), strict=True)]

        starts = [target.length(a.seq) for a in active]
        outputs = target.step([Row(a.seq, [a.anchor, *d.tokens.tolist()]) for a, d in zip(active, drafts, strict=True)])
        clock.lap("verify")

        outcomes: list[Outcome] = []
        committed: list[tuple[list[int], str, int]] = []
        injected_ms = 0.0
        for a, start, proposal, draft, output in zip(active, starts, proposals, drafts, outputs, strict=True):
            accepted, bonus = a.sampler.verify(output.logits, draft)
            outcomes.append(judge(proposal, len(draft), accepted, bonus))
            anchor = a.anchor
            tokens, text = a.trim([*draft.tokens[:accepted].tolist(), bonus], target.info.n_ctx - start - 1)
            kept = min(accepted, len(tokens))
            a.anchor = tokens[-1]
            target.rewind(a.seq, start + 1 + kept)  # rejected positions leave the cache
            began = self.clock()
            self._observe(a.seq, [anchor, *tokens[:kept]], output, outcomes[-1])
            injected_ms += (self.clock() - began) * 1e3
            self._cached[a.seq] += [anchor, *tokens[:kept]]
            committed.append((tokens, text, kept))
        times = clock.times(injected_ms)
        schedule.observe(outcomes, times)

        margins = [
            _margins(o.logits, len(c[0])) if self.margins else None for o, c in zip(outputs, committed, strict=True)
        ]
        return [
            Round(
                request=a.request.id,
                tokens=tuple(tokens),
                text=text,
                drafted=len(proposal),
                verified=len(draft),
                accepted=kept,
                confidence=None if proposal.confidence is None else tuple(map(float, proposal.confidence)),
                source=proposal.source if len(proposal) else "",
                times=times,
                parked=schedule.parked,
                finish=a.finish,
                shared=len(active),
                margins=margin,
            )
            for a, proposal, draft, (tokens, text, kept), margin in zip(
                active, proposals, drafts, committed, margins, strict=True
            )
        ]

    def _propose(self, active: list[_Active]) -> list[Draft]:
        """A draft per active request, within what its token limit, the context and the pass leave room for."""
        drafter, share = self.drafter, self.target.max_rows // len(active) - 1
        longest = drafter.block_size if drafter is not None else 0
        limits = [max(0, min(longest, share, self._room(a))) for a in active]
        blocks = self.schedule.block(limits, fmean(self.target.length(a.seq) for a in active))
        if drafter is None or not any(blocks):
            return [EMPTY_DRAFT for _ in active]
        proposals = drafter.quick([a.draft_request(block) for a, block in zip(active, blocks, strict=True)])
        if drafter.has_pass:
            sizes = self.schedule.passes([min(block, drafter.pass_block) for block in blocks], proposals)
            asked = [i for i, size in enumerate(sizes) if size > 0]
            made = drafter.propose([active[i].draft_request(sizes[i]) for i in asked]) if asked else []
            for i, draft in zip(asked, made, strict=True):
                proposals[i] = draft
        return proposals

    def _room(self, a: _Active) -> int:
        """Draft tokens that can still be committed: the bonus token takes one place of every limit."""
        room = self.target.info.n_ctx - self.target.length(a.seq) - 2
        if a.request.max_tokens is not None:
            room = min(room, a.request.max_tokens - a.produced - 1)
        return room

    def _observe(self, seq: int, tokens: list[int], output: RowOutput, outcome: Outcome | None = None) -> None:
        if self.drafter is None:
            return
        if outcome is not None and outcome.judged:
            self.drafter.feedback(seq, outcome.judged, outcome.kept)
        features = None if output.features is None else output.features[: len(tokens)]
        self.drafter.observe(seq, tokens, features)

    # -- prefill -------------------------------------------------------------------------------------------------

    def _prefill(self, request: Request, free: list[int]) -> tuple[_Active, Round]:
        """Compute the prompt (what is not cached yet) and draw the first token."""
        began = time.perf_counter()
        prompt = list(request.prompt)
        self._check(prompt)
        seq, cached = self._place(prompt, free)
        for keeper in (self.target, self.drafter):
            if keeper is not None:
                keeper.rewind(seq, cached)
        self._cached[seq] = prompt[:cached]
        output: RowOutput | None = None
        for begin in range(cached, len(prompt), PREFILL_CHUNK):
            self.on_prefill(begin, len(prompt))
            chunk = prompt[begin : begin + PREFILL_CHUNK]
            last = begin + len(chunk) == len(prompt)
            output = self.target.step([Row(seq, chunk, n_logits=1 if last else 0)])[0]
            self._observe(seq, chunk, output)
            self._cached[seq] += chunk
        assert output is not None  # at least the last prompt token is always computed
        a = _Active(request, seq, Sampler(request.sampling, prompt), TextStream(self.target.tokenizer, request.stop))
        tokens, text = a.trim([a.sampler.first(output.logits[-1])], self.target.info.n_ctx - len(prompt))
        a.anchor = tokens[-1]
        milliseconds = (time.perf_counter() - began) * 1e3
        return a, Round(
            request=request.id,
            tokens=tuple(tokens),
            text=text,
            times=Times(verify=milliseconds),
            finish=a.finish,
            prefill_tokens=len(prompt) - cached,
            cached=cached,
            margins=_margins(output.logits[-1:], 1) if self.margins else None,
        )

    def _check(self, prompt: list[int]) -> None:
        if not prompt:
            raise BadInput("the prompt is empty: there is nothing to continue")
        if len(prompt) >= self.target.info.n_ctx:
            raise ContextFull(
                f"the prompt has {len(prompt)} tokens, the context holds {self.target.info.n_ctx}",
                hint=f"--ctx {len(prompt) + 512}",
            )

    def _place(self, prompt: list[int], free: list[int]) -> tuple[int, int]:
        """(sequence, tokens of the prompt it has cached): the free sequence that knows most of the prompt."""
        known = {s: min(common_prefix(self._cached.get(s, []), prompt), len(prompt) - 1) for s in free}
        seq = max(free, key=lambda s: known[s])
        return seq, known[seq]


class _Clock:
    """Splits a round into passes and overhead: native time of the target is `verify`, the drafter's call is `draft`.

    Features that the drafter took in only now, because it was parked before, count as `inject`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._native, self._delayed = self._counters()
        self._began = self._last = engine.clock()
        self._laps: dict[str, float] = {}

    def _counters(self) -> tuple[float, float]:
        drafter = self._engine.drafter
        return self._engine.target.native_ms, drafter.inject_ms if drafter is not None else 0.0

    def lap(self, name: str) -> None:
        now = self._engine.clock()
        self._laps[name] = (now - self._last) * 1e3
        self._last = now

    def times(self, inject_ms: float) -> Times:
        total = (self._engine.clock() - self._began) * 1e3
        native, delayed = self._counters()
        verify, delayed = native - self._native, delayed - self._delayed
        draft = max(0.0, self._laps["draft"] - delayed)
        inject = inject_ms + delayed
        return Times(draft, verify, inject, own=max(0.0, total - draft - verify - inject))


def judge(proposal: Draft, verified: int, accepted: int, bonus: int) -> Outcome:
    """What is known of a proposal after its round.

    The bonus token follows an accepted prefix: if that ends before the (deterministic) proposal does, it tells for free
    whether the next token would have been kept. A sampled one would be kept by another rule: nothing is known of it.
    """
    judged, kept = verified, accepted
    if accepted == verified < len(proposal) and proposal.probs is None:
        judged, kept = verified + 1, accepted + (int(proposal.tokens[verified]) == bonus)
    return Outcome(proposal, verified, accepted, judged, kept)


def _margins(logits: FloatArray, count: int) -> tuple[float, ...]:
    """First minus second logit of the first `count` rows of [n, V]."""
    top = np.partition(logits[:count], -2, axis=1)[:, -2:]
    return tuple(map(float, top[:, 1] - top[:, 0]))
