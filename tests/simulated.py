"""A machine whose every pass takes the time it is told to: guard and schedule are tested without a stopwatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_cli.backends.base import Draft, Drafter, DraftRequest, FloatArray, Row, RowOutput
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.schedule import Schedule
from fakes import TableTarget

VERIFY = {1: 10.0, 2: 13.0, 3: 16.0, 4: 17.0, 5: 22.0, 6: 24.0, 8: 30.0, 12: 44.0, 17: 62.0}


@dataclass
class Clock:
    """Seconds that pass only when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, ms: float) -> None:
        self.now += ms / 1e3


class TimedTarget(TableTarget):
    """A TableTarget with a clock: a pass of n tokens takes ms(n), with noise. Sharp: almost deterministic even sampled.

    switch: ms that a pass of another number of tokens than the last takes longer
    """

    def __init__(
        self,
        ms: Curve,
        clock: Clock,
        *,
        noise: float = 0.0,
        n_vocab: int = 20,
        seed: int = 0,
        n_seq: int = 1,
        switch: float = 0.0,
    ) -> None:
        super().__init__(n_vocab, seed=seed, n_seq=n_seq, n_ctx=100_000, spread=10.0)
        self.ms, self.clock, self.noise, self.switch = ms, clock, noise, switch
        self._last = (0, 0)  # of the last pass: tokens, rows of logits
        self._random = np.random.default_rng(seed)

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        outputs = super().step(rows)
        shape = (sum(len(r.tokens) for r in rows), sum(len(o.logits) for o in outputs))
        ms = self.pass_ms(shape[0]) + self.switch * (shape != self._last)
        ms *= float(np.exp(self._random.normal(0.0, self.noise)))
        self._last = shape
        self.clock.spend(ms)
        self.native_ms += ms
        return outputs

    def pass_ms(self, tokens: int) -> float:
        return self.ms.at(tokens)


Quality = Callable[[np.random.Generator], tuple[float, float | None]]


class TimedDrafter(Drafter):
    """Drafts the target's own greedy continuation, wrong at random: quality(rng) -> (chance to be right, confidence shown).

    each: share of the pass's time that every further request adds
    """

    name = kind = "timed"

    def __init__(
        self,
        target: TimedTarget,
        quality: Quality,
        *,
        ms: Curve,
        each: float = 0.0,
        block_size: int = 4,
        seed: int = 0,
    ) -> None:
        self.block_size, self.feature_layers = block_size, (0,)
        self.quality, self.ms, self.each = quality, ms, each
        self.passes = self.injections = 0
        self.seen: dict[int, list[int]] = {}
        self._target = target
        self._random = np.random.default_rng(seed)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.passes += 1
        self._target.clock.spend(self.ms.at(max(r.block for r in requests)) * (1 + self.each * (len(requests) - 1)))
        return [self._propose(r) for r in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        text = [*self._target.cache[request.seq], request.anchor]
        assert self.seen.get(request.seq, []) == text[:-1], "the drafter was not told what is committed"
        tokens, confidence = [], []
        for _ in range(request.block):
            chance, shown = self.quality(self._random)
            true = int(self._target.row(text).argmax())
            token = true if self._random.random() < chance else (true + 1) % self._target.info.n_vocab
            tokens.append(token)
            confidence.append(shown)
            text.append(token)
        known = None if confidence[0] is None else np.asarray(confidence, dtype=np.float32)
        return Draft(np.asarray(tokens, dtype=np.int64), known, source=self.kind)

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        assert features is not None
        assert features.argmax(axis=1).tolist() == list(tokens), "features do not belong to the committed tokens"
        self.injections += 1
        self.seen.setdefault(seq, []).extend(tokens)

    def rewind(self, seq: int, length: int) -> None:
        del self.seen.setdefault(seq, [])[length:]

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.seen[destination] = self.seen[source][:length]


def steady(chance: float, shown: float | None) -> Quality:
    return lambda random: (chance, shown)


def honest(low: float, high: float) -> Quality:
    """A head that knows: its confidence is the chance, which differs from token to token."""

    def quality(random: np.random.Generator) -> tuple[float, float]:
        chance = float(random.uniform(low, high))
        return chance, chance

    return quality


@dataclass
class Machine:
    """A target, a drafter and a clock to run policies on."""

    quality: Quality
    verify: dict[int, float] = field(default_factory=lambda: dict(VERIFY))
    draft: dict[int, float] = field(default_factory=lambda: {1: 3.0, 4: 3.5})
    each: float = 0.0
    block_size: int = 4
    noise: float = 0.05
    n_seq: int = 1
    switch: float = 0.0

    def costs(self) -> CostModel:
        """What a perfect profile would say."""
        many = None
        if self.n_seq > 1:
            many = self.n_seq, Curve({n: ms * (1 + self.each * (self.n_seq - 1)) for n, ms in self.draft.items()})
        return CostModel(
            Curve(self.verify),
            draft=Curve(self.draft),
            several=many,
            own_ms=0.0,
            pass_own_ms=0.0,
            switch_ms=self.switch,
        )

    def run(
        self,
        schedule: Schedule,
        tokens: int = 400,
        *,
        seed: int = 0,
        requests: int = 1,
        wrap: Callable[[Drafter, Clock], Drafter] = lambda drafter, clock: drafter,
        sampling: SamplingOptions | None = None,
    ) -> tuple[float, list[Round]]:
        """(tokens per second of decoding, rounds)."""
        clock = Clock()
        target = TimedTarget(
            Curve(self.verify), clock, noise=self.noise, seed=seed, n_seq=self.n_seq, switch=self.switch
        )
        drafter = TimedDrafter(
            target, self.quality, ms=Curve(self.draft), each=self.each, block_size=self.block_size, seed=seed + 1
        )
        engine = Engine(target, wrap(drafter, clock), schedule, clock=clock)
        rounds = list(
            engine.run([Request([1, i % 7 + 2], tokens, sampling or SamplingOptions(), id=i) for i in range(requests)])
        )
        decoding = [r for r in rounds if not r.is_prefill]
        ms = sum(r.times.total / r.shared for r in decoding)
        return sum(len(r.tokens) for r in decoding) / ms * 1e3, rounds
