"""The default policy on recorded answers and drafts, on a clock that takes what the profile of this machine says: no noise of
the machine, so differences of a percent between two policies can be seen.

    python tests/measure_replay.py [--formats F16,Q8_0,Q4_1] [--caution 1.0,1.6,2.0] [--kept] [--more]
    python tests/measure_replay.py --documents FILE --count N

Answers are the target's own, greedy, to the prompts of `dspark bench --local` (four a kind), to those of replay_prompts.jsonl
(sixteen a kind), or texts of `documents.jsonl` of a training; at every position the drafter's block is recorded. What is
replayed is the real engine with the real lookup; `auto` also pays `EXTRA_MS` a round, for deciding. Static lengths are
replayed too: the best is chosen afterwards, for each kind, by its mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, median

import numpy as np

from dspark_cli.backends import lookup
from dspark_cli.backends.base import Draft, DraftRequest, FloatArray, Row, RowOutput
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.bench.formats import requantize
from dspark_cli.bench.prompts import KINDS, Prompt
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import load_beliefs
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.registry import resolve
from dspark_cli.training.documents import read_documents
from fakes import FakeTokenizer
from simulated import Clock, TimedDrafter, TimedTarget, steady

MODEL = "smollm2-135m"
NOISE = 0.03  # of a pass's time, log-normal
EXTRA_MS = 0.1
TAKE_IN_MS = 0.065  # a token's features, beyond the first: the profile times what a round hands over
Written = tuple[str, list[int], list[int]]  # kind, prompt, answer
MORE = Path(__file__).parent / "replay_prompts.jsonl"
AHEAD = 6  # tokens of a recorded answer that are left over, so that the last drafts can be judged


@dataclass(frozen=True)
class Recorded:
    """A prompt and an answer, both as small ids; at position i of the answer the block that was drafted after its token i."""

    kind: str
    prompt: list[int]
    answer: list[int]
    drafts: list[Draft]


def answers(session: Session, tokens: int, *, more: bool) -> Iterator[Written]:
    """The target's answers to the prompts of the bench, or to more."""
    of_file = [Prompt(**json.loads(line)) for line in MORE.read_text().splitlines()] if more else []
    for prompt in of_file or chain.from_iterable(KINDS.values()):
        request = prompt.request(session, tokens + AHEAD, SamplingOptions())
        yield prompt.kind, list(request.prompt), [t for r in session.run(request, plain=True) for t in r.tokens]


def written(path: Path, count: int) -> Iterator[Written]:
    """`count` documents of a training, spread over the file; sampled ones are replayed as if they were greedy."""
    documents = list(read_documents(path))
    for d in documents[:: max(1, len(documents) // count)][:count]:
        yield "sampled" if d.temperature else "greedy", list(d.ids[: d.answer_start]), list(d.ids[d.answer_start :])


def record(session: Session, texts: Iterable[Written]) -> list[Recorded]:
    assert isinstance(session.drafter, CombinedDrafter)
    target, drafter, found = session.target, session.drafter.model, []
    for kind, prompt, answer in texts:
        if len(answer) <= 2 * AHEAD:
            continue
        session._engine.forget()
        for keeper in (target, drafter):
            keeper.drop(0)
        ids, size, drafts = [*prompt, *answer], len(prompt), []
        parts = [target.step([Row(0, ids[i : i + 256], 1)])[0].features for i in range(0, len(ids), 256)]
        features = np.concatenate(parts)  # type: ignore[arg-type]
        drafter.observe(0, prompt, features[:size])
        for k in range(size, len(ids)):
            drafts.append(drafter.propose([DraftRequest(0, ids[k], drafter.block_size)])[0])
            drafter.observe(0, ids[k : k + 1], features[k : k + 1])
        found.append(_renumbered(kind, ids, size, drafts))
    return found


def _renumbered(kind: str, ids: list[int], size: int, drafts: Sequence[Draft]) -> Recorded:
    """Small ids, so that a row of logits is short; tokens that were drafted and never came are all one."""
    small = {token: i + 1 for i, token in enumerate(dict.fromkeys(ids))}
    mine = [small[token] for token in ids]
    blocks = [Draft(np.asarray([small.get(int(t), 0) for t in d.tokens]), d.confidence, None, d.source) for d in drafts]
    return Recorded(kind, mine[:size], mine[size:], blocks)


class ReplayTarget(TimedTarget):
    """Goes on with the recorded answer, in the time that `costs` say for the depth; a round takes `extra_ms` more."""

    def __init__(self, text: Recorded, costs: CostModel, clock: Clock, seed: int, extra_ms: float) -> None:
        super().__init__(costs.verify, clock, noise=NOISE, n_vocab=2, seed=seed, switch=costs.switch_ms)
        self.text, self.costs, self.extra_ms = [*text.prompt, *text.answer], costs, extra_ms
        n = max(self.text) + 1
        self.info = replace(self.info, n_vocab=n)
        self.tokenizer = FakeTokenizer(n, frozenset(range(n)))  # no text

    def row(self, tokens: Sequence[int]) -> FloatArray:
        following = self.text[len(tokens)] if len(tokens) < len(self.text) else 0
        return np.eye(1, self.info.n_vocab, following, dtype=np.float32)[0]

    def pass_ms(self, tokens: int) -> float:
        return self.costs.verify_at(1, self.length(0), tokens)

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        self.clock.spend(self.costs.own_ms + self.extra_ms)
        return super().step(rows)


class ReplayDrafter(TimedDrafter):
    """Drafts what was drafted at this position."""

    def __init__(self, text: Recorded, target: ReplayTarget) -> None:
        assert target.costs.draft is not None
        super().__init__(target, steady(1.0, None), ms=target.costs.draft, block_size=len(text.drafts[0]))
        self.name = self.kind = text.drafts[0].source
        self._text = text

    def _propose(self, request: DraftRequest) -> Draft:
        return self._text.drafts[self._target.length(0) - len(self._text.prompt)].prefix(request.block)

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        inject = self._target.costs.inject  # type: ignore[attr-defined]
        self._target.clock.spend((inject.at(1) if inject else 0.0) + TAKE_IN_MS * (len(tokens) - 1))
        super().observe(seq, tokens, features)


def decode_ms(engine: Engine, text: Recorded, tokens: int) -> float:
    request = Request(text.prompt, min(tokens, len(text.answer) - AHEAD), SamplingOptions())
    return sum(r.times.total for r in engine.run([request]) if not r.is_prefill)


def plain_ms(texts: Sequence[Recorded], costs: CostModel, tokens: int) -> list[float]:
    """What each text takes without drafting."""
    found = []
    for seed, text in enumerate(texts):
        clock = Clock()
        engine = Engine(ReplayTarget(text, costs, clock, seed, 0.0), None, Off(), clock=clock)
        found.append(decode_ms(engine, text, tokens))
    return found


def replay(
    texts: Sequence[Recorded], plain: Sequence[float], costs: CostModel, drafter: Path, tokens: int, kept: bool
) -> dict[str, list[float]]:
    """Speed over plain decoding of each text, by kind; `kept`: one session answers them all."""
    ratios: dict[str, list[float]] = defaultdict(list)
    schedule = None
    for seed, (text, alone) in enumerate(zip(texts, plain, strict=True)):
        clock = Clock()
        if schedule is None or not kept:
            schedule = AutoSchedule(copy.deepcopy(costs), beliefs=load_beliefs(drafter, print))
        target = ReplayTarget(text, costs, clock, seed, EXTRA_MS)
        both = CombinedDrafter(ReplayDrafter(text, target), lookup.LookupDrafter(), clock=clock)
        ratios[text.kind].append(alone / decode_ms(Engine(target, both, schedule, clock=clock), text, tokens))
    return ratios


def fixed(
    texts: Sequence[Recorded], plain: Sequence[float], costs: CostModel, length: int, tokens: int
) -> dict[str, float]:
    """Mean speed over plain decoding of a static length, by kind; without what deciding costs."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for seed, (text, alone) in enumerate(zip(texts, plain, strict=True)):
        clock = Clock()
        target = ReplayTarget(text, costs, clock, seed, 0.0)
        engine = Engine(target, ReplayDrafter(text, target), Fixed(length), clock=clock)
        ratios[text.kind].append(alone / decode_ms(engine, text, tokens))
    return {kind: fmean(found) for kind, found in ratios.items()}


def _shown(ratios: Sequence[float]) -> str:
    """Median, and in parentheses the worst twentieth (the worst of a few)."""
    return f"{median(ratios):.3f} ({np.quantile(ratios, 0.05, method='lower'):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="F16,Q8_0,Q4_1")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--caution", default=str(lookup.CAUTION), help="powers of lookup's prior, one run each")
    parser.add_argument("--more", action="store_true", help="the prompts of replay_prompts.jsonl")
    parser.add_argument("--documents", type=Path)
    parser.add_argument("--count", type=int, default=90, help="of the documents (default 90)")
    parser.add_argument("--kept", action="store_true", help="one session answers all prompts, not each a fresh one")
    options = parser.parse_args()
    found = resolve(MODEL)
    assert found.drafter_path is not None
    for word in options.formats.split(","):
        path = requantize(found.path, word, Path(tempfile.gettempdir()) / "dspark-formats")
        with Session.open(OpenOptions(path, MODEL, drafter_path=found.drafter_path, ctx=2048)) as session:
            costs = copy.deepcopy(session.costs)
            given = options.documents
            texts = record(
                session, written(given, options.count) if given else answers(session, options.tokens, more=options.more)
            )
        lengths = range(1, len(texts[0].drafts[0]) + 1)
        plain = plain_ms(texts, costs, options.tokens)
        static = [fixed(texts, plain, costs, n, options.tokens) for n in lengths]
        for caution in map(float, options.caution.split(",")):
            lookup.CAUTION = caution
            ratios = replay(texts, plain, costs, found.drafter_path, options.tokens, options.kept)
            every = [r for kind in ratios.values() for r in kind]
            cells = "  ".join(f"{kind} {_shown(r)}" for kind, r in ratios.items())
            print(f"{word} caution {caution:g}: all {_shown(every)}  {cells}", flush=True)
            best = {kind: max(zip((s[kind] for s in static), lengths, strict=True)) for kind in ratios}
            means = "  ".join(
                f"{kind} {fmean(r):.3f} of {best[kind][0]:.3f} (fixed:{best[kind][1]}), {fmean(r) / best[kind][0]:.3f}"
                for kind, r in ratios.items()
            )
            print(f"{word} means, of the best static length: {means}", flush=True)


if __name__ == "__main__":
    main()
