"""Every arm on this machine, in one process, in turn: what `dspark bench --local` runs.

A cycle is one prompt at one temperature: plain decoding, every arm, plain decoding again. Ratios are taken inside a cycle,
so that a machine that gets slower or faster does not favour an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dspark_cli.backends.base import BadInput, Drafter
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.bench.arms import PLAIN, Arm, answer
from dspark_cli.bench.prompts import KINDS, Prompt
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import Belief
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off, Threshold
from dspark_cli.engine.session import OpenOptions, Session, first_difference
from dspark_cli.engine.stats import Stats

AUTO = "auto"
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)  # static lengths that are tried, as far as the drafter drafts
THRESHOLDS = (0.3, 0.5, 0.75)  # llama.cpp's p_min


@dataclass(frozen=True)
class Settings:
    """What to measure. `prompts`: per kind;  `repeats`: cycles per prompt and temperature;  `arms`: () = all."""

    kinds: tuple[str, ...] = tuple(KINDS)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    prompts: int = 2
    tokens: int = 96
    repeats: int = 2
    seed: int = 0
    arms: tuple[str, ...] = ()

    def cases(self) -> list[tuple[Prompt, float]]:
        return [(p, t) for kind in self.kinds for p in KINDS[kind][: self.prompts] for t in self.temperatures]


@dataclass
class Run:
    """One answer of one arm. `plain_tok_s`: mean of plain decoding before and after, in the same cycle."""

    arm: str
    format: str
    prompt: Prompt
    temperature: float
    stats: Stats
    rounds: list[Round]
    plain_tok_s: float = 0.0
    first_difference: int | None = None
    margin: float | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for item in self.rounds for token in item.tokens]

    @property
    def ratio(self) -> float:
        return self.stats.decode_tok_s / self.plain_tok_s if self.plain_tok_s else 0.0


@dataclass
class Results:
    """What was finished. `costs`: per format what the profile said;  `drafters`: arm -> drafter's name."""

    runs: list[Run] = field(default_factory=list)
    costs: dict[str, CostModel] = field(default_factory=dict)
    drafters: dict[str, str] = field(default_factory=dict)
    model: str = ""
    backend: str = ""
    device: str = ""
    interrupted: bool = False


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    format: str
    what: str


def arms_of(session: Session) -> list[Arm]:
    """Plain decoding, every static length, thresholds and `auto`, with every drafter present.

    Arms of one model drafter share it, and have a lookup of their own: what that has learned is part of the arm.
    """
    assert isinstance(session.schedule, AutoSchedule)
    costs, beliefs = session.schedule.costs, session.schedule.beliefs

    def auto() -> AutoSchedule:
        own = {source: Belief(b.sts, b.survival, b.learns) for source, b in beliefs.items()}
        copy = CostModel.from_dict(costs.as_dict())
        return AutoSchedule(copy, beliefs=own, label=session.target.info.format, cap=session.target.max_rows)

    main = session.drafter
    model = main.model if isinstance(main, CombinedDrafter) else None

    def fresh(with_lookup: bool = False) -> Drafter:
        if model is None:
            return LookupDrafter()
        return CombinedDrafter(model, LookupDrafter() if with_lookup else None)

    longest = model.block_size if model is not None else LookupDrafter().block_size
    arms = [Arm(PLAIN, None, Off()), Arm(AUTO, fresh(with_lookup=True), auto())]
    arms += [Arm(f"fixed:{n}", fresh(), Fixed(n)) for n in LENGTHS if n <= longest]
    arms += [Arm(f"threshold:{p:g}", fresh(), Threshold(p)) for p in THRESHOLDS]
    if model is not None:
        arms += [Arm(f"auto {model.kind}", fresh(), auto()), Arm("auto lookup", LookupDrafter(), auto())]
        arms += [Arm(f"lookup fixed:{n}", LookupDrafter(), Fixed(n)) for n in (2, 4, 8)]
    return arms


def chosen(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The arms named, and plain decoding; all without names. Raises BadInput for a name that no arm has."""
    known = [arm.name for arm in arms]
    for name in names:
        if name not in known:
            raise BadInput(f"unknown arm {name!r}: one of {', '.join(known)}")
    return [arm for arm in arms if not names or arm.name == PLAIN or arm.name in names]


def run_all(
    options: OpenOptions,
    files: Sequence[Path],
    settings: Settings,
    results: Results,
    progress: Callable[[Progress], None] = lambda p: None,
) -> None:
    """Fill `results`. Whatever ends it early (Ctrl-C too), the cycles that were finished are in there."""
    cycles = len(settings.cases()) * settings.repeats
    for index, path in enumerate(files):
        with Session.open(OpenOptions(**{**vars(options), "model": path, "policy": "auto"})) as session:
            assert isinstance(session.schedule, AutoSchedule)
            arms, info = chosen(arms_of(session), settings.arms), session.target.info
            form = info.format
            results.costs[form] = CostModel.from_dict(session.schedule.costs.as_dict())
            results.drafters |= {arm.name: arm.drafter.name for arm in arms if arm.drafter is not None}
            results.model, results.backend, results.device = options.name, info.backend, info.device
            total = cycles * len(arms) * len(files)
            done = index * cycles * len(arms)
            progress(Progress(done, total, form, "warming up"))
            for arm in arms:
                _answer(session, arm, KINDS["question"][0].request(session, 8, SamplingOptions(seed=settings.seed)))
            for repeat in range(settings.repeats):
                for prompt, temperature in settings.cases():
                    sampling = SamplingOptions(temperature=temperature, seed=settings.seed + repeat)
                    request = prompt.request(session, settings.tokens, sampling)
                    cycle: list[Run] = []
                    for run in _cycle(session, arms, request, form, prompt, temperature, backwards=repeat % 2 == 1):
                        cycle.append(run)
                        done += run.arm != PLAIN or len(cycle) == 1
                        progress(Progress(done, total, form, f"{prompt.kind}, temperature {temperature:g}: {run.arm}"))
                    results.runs += _compared(cycle)


def _cycle(
    session: Session,
    arms: Sequence[Arm],
    request: Request,
    form: str,
    prompt: Prompt,
    temperature: float,
    *,
    backwards: bool,
) -> Iterator[Run]:
    """Plain, the other arms in turn, plain again."""
    plain, others = arms[0], list(arms[1:])
    for arm in (plain, *(reversed(others) if backwards else others), plain):
        stats, rounds = _answer(session, arm, request)
        yield Run(arm.name, form, prompt, temperature, stats, rounds)


def _compared(cycle: list[Run]) -> list[Run]:
    """The runs of a cycle, each set against plain decoding in it."""
    first, *others, last = cycle
    speed = (first.stats.decode_tok_s + last.stats.decode_tok_s) / 2
    margins = [m for item in first.rounds for m in item.margins or ()]
    expected = first.tokens
    for run in (first, *others):
        run.plain_tok_s = speed
        at = first_difference(run.tokens, expected)
        if at is not None:
            run.first_difference = at
            run.margin = margins[at] if at < len(margins) else None
    first.plain_tok_s = first.stats.decode_tok_s  # its own ratio is 1
    return [first, *others]


def _answer(session: Session, arm: Arm, request: Request) -> tuple[Stats, list[Round]]:
    """One answer; plain decoding also says how near its choices were."""
    rounds = answer(session.target, arm, request, margins=arm.drafter is None)
    return Stats.of(rounds), rounds
