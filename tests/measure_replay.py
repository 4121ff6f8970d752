"""The default policy on recorded answers and drafts, on a clock that takes what the profile of this machine says: no noise of
the machine, so differences of a percent between two policies can be seen.

    python tests/measure_replay.py [--formats F16,Q8_0,Q4_1] [--caution 1.0,1.6,2.0] [--kept]

Answers are the target's own, greedy, to the prompts of `dspark bench --local`; at every position the drafter's block is
recorded. What is replayed is the real engine with the real lookup. `auto` also pays `EXTRA_MS` a round, for deciding.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from dspark_cli.backends import lookup
from dspark_cli.backends.base import Draft, Drafter, DraftRequest, FloatArray, Row, RowOutput, Target, TargetInfo
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.bench.formats import requantize
from dspark_cli.bench.prompts import KINDS
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import load_beliefs
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Off
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.registry import resolve
from fakes import FakeTokenizer
from simulated import Clock

MODEL = "smollm2-135m"
NOISE = 0.03  # of a pass's time, log-normal
EXTRA_MS = 0.1
TAKE_IN_MS = 0.065  # a token's features, beyond the first: the profile times what a round hands over
AHEAD = 6  # tokens of a recorded answer that are left over, so that the last drafts can be judged


@dataclass(frozen=True)
class Recorded:
    """A prompt and an answer, both as small ids; at position i of the answer the block that was drafted after its token i."""

    kind: str
    prompt: list[int]
    answer: list[int]
    drafts: list[Draft]


def record(session: Session, tokens: int) -> list[Recorded]:
    assert isinstance(session.drafter, CombinedDrafter)
    target, drafter, found = session.target, session.drafter.model, []
    for prompts in KINDS.values():
        for prompt in prompts:
            request = prompt.request(session, tokens + AHEAD, SamplingOptions())
            answer = [t for r in session.run(request, plain=True) for t in r.tokens]
            session._engine.forget()
            ids = [*request.prompt, *answer]
            for keeper in (target, drafter):
                keeper.rewind(0, 0)
            features = np.concatenate(
                [target.step([Row(0, ids[i : i + 256], 1)])[0].features.copy() for i in range(0, len(ids), 256)]  # type: ignore[union-attr]
            )
            size, drafts = len(request.prompt), []
            drafter.observe(0, ids[:size], features[:size])
            for k in range(size, len(ids)):
                drafts.append(drafter.propose([DraftRequest(0, ids[k], drafter.block_size)])[0])
                drafter.observe(0, ids[k : k + 1], features[k : k + 1])
            if len(answer) > 2 * AHEAD:
                found.append(_renumbered(prompt.kind, ids, size, drafts))
    return found


def _renumbered(kind: str, ids: list[int], size: int, drafts: Sequence[Draft]) -> Recorded:
    """Small ids, so that a row of logits is short; tokens that were drafted and never came are all one."""
    small = {token: i + 1 for i, token in enumerate(dict.fromkeys(ids))}
    mine = [small[token] for token in ids]
    blocks = [Draft(np.asarray([small.get(int(t), 0) for t in d.tokens]), d.confidence, None, d.source) for d in drafts]
    return Recorded(kind, mine[:size], mine[size:], blocks)


class ReplayTarget(Target):
    """Goes on with the recorded answer, whatever it is given."""

    def __init__(self, text: Recorded, costs: CostModel, clock: Clock, seed: int, extra_ms: float) -> None:
        self.text, self.costs, self.clock, self.extra_ms = [*text.prompt, *text.answer], costs, clock, extra_ms
        n = max(self.text) + 1
        self.info = TargetInfo("replay", "", "fake", "", "cpu", n, 1, 2, 8192, 1)
        self.tokenizer, self.max_rows, self.held = FakeTokenizer(n, frozenset(range(n))), 512, 0  # no text
        self._random = np.random.default_rng(seed)

    def render_chat(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        raise NotImplementedError

    def request_features(self, layers: Sequence[int]) -> None: ...

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        tokens = rows[0].tokens
        logits = np.zeros((len(tokens), self.info.n_vocab), dtype=np.float32)
        following = [
            self.text[i] if i < len(self.text) else 0 for i in range(self.held + 1, self.held + 1 + len(tokens))
        ]
        logits[np.arange(len(tokens)), following] = 1.0
        ms = self.costs.verify_at(1, self.held, len(tokens)) * float(np.exp(self._random.normal(0.0, NOISE)))
        self.held += len(tokens)
        self.native_ms += ms
        self.clock.spend(ms + self.costs.own_ms + self.extra_ms)
        keep = len(tokens) if rows[0].n_logits is None else rows[0].n_logits
        return [RowOutput(logits[len(tokens) - keep :], np.zeros((len(tokens), 1), dtype=np.float32))]

    def length(self, seq: int) -> int:
        return self.held

    def rewind(self, seq: int, length: int) -> None:
        self.held = min(self.held, length)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class ReplayDrafter(Drafter):
    """Drafts what was drafted at this position."""

    feature_layers = (0,)

    def __init__(self, text: Recorded, target: ReplayTarget) -> None:
        self._text, self._target = text, target
        self.name = self.kind = text.drafts[0].source
        self.block_size = len(text.drafts[0])

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        costs, block = self._target.costs, requests[0].block
        self._target.clock.spend(costs._draft_ms(1, block, self._target.held))
        return [self._text.drafts[self._target.held - len(self._text.prompt)].prefix(block)]

    def observe(self, seq: int, tokens: Sequence[int], features: FloatArray | None) -> None:
        inject = self._target.costs.inject
        self._target.clock.spend((inject.at(1) if inject else 0.0) + TAKE_IN_MS * (len(tokens) - 1))

    def rewind(self, seq: int, length: int) -> None: ...

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        raise NotImplementedError


def decode_ms(engine: Engine, text: Recorded, tokens: int) -> float:
    request = Request(text.prompt, min(tokens, len(text.answer) - AHEAD), SamplingOptions())
    return sum(r.times.total for r in engine.run([request]) if not r.is_prefill)


def replay(
    texts: Sequence[Recorded], costs: CostModel, drafter: Path, tokens: int, kept: bool
) -> dict[str, list[float]]:
    """Speed over plain decoding of each text, by kind; `kept`: one session answers them all."""
    ratios: dict[str, list[float]] = defaultdict(list)
    schedule = None
    for seed, text in enumerate(texts):
        clock = Clock()
        plain = decode_ms(Engine(ReplayTarget(text, costs, clock, seed, 0.0), None, Off(), clock=clock), text, tokens)
        if schedule is None or not kept:
            schedule = AutoSchedule(copy.deepcopy(costs), beliefs=load_beliefs(drafter, print))
        target = ReplayTarget(text, costs, clock, seed, EXTRA_MS)
        both = CombinedDrafter(ReplayDrafter(text, target), lookup.LookupDrafter(), clock=clock)
        ratios[text.kind].append(plain / decode_ms(Engine(target, both, schedule, clock=clock), text, tokens))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="F16,Q8_0,Q4_1")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--caution", default=str(lookup.CAUTION), help="powers of lookup's prior, one run each")
    parser.add_argument("--kept", action="store_true", help="one session answers all prompts, not each a fresh one")
    options = parser.parse_args()
    found = resolve(MODEL)
    assert found.drafter_path is not None
    for word in options.formats.split(","):
        path = requantize(found.path, word, Path(tempfile.gettempdir()) / "dspark-formats")
        with Session.open(OpenOptions(path, MODEL, drafter_path=found.drafter_path, ctx=2048)) as session:
            costs, texts = copy.deepcopy(session.costs), record(session, options.tokens)
        for caution in map(float, options.caution.split(",")):
            lookup.CAUTION = caution
            ratios = replay(texts, costs, found.drafter_path, options.tokens, options.kept)
            every = [r for kind in ratios.values() for r in kind]
            cells = "  ".join(f"{kind} {median(r):.3f} ({min(r):.3f})" for kind, r in ratios.items())
            print(f"{word} caution {caution:g}: all {median(every):.3f} ({min(every):.3f})  {cells}", flush=True)


if __name__ == "__main__":
    main()
