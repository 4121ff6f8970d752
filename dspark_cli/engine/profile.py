"""Measuring a loaded pair: what passes of each width cost, in a few seconds, and remembering it where that is safe.

A profile is kept only if it was finished, on a machine quiet enough that repetitions agree. It is found again only for the
same files, library, machine and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_path

from dspark_cli.backends.base import Drafter, DraftRequest, Row, Target
from dspark_cli.backends.machine import installed, processor
from dspark_cli.engine.costs import CostModel, Curve

SCHEMA = "dspark-profile/3"
BUDGET_S = 4.0
SETTLING = (
    2  # passes of a shape on a GPU before one is timed: libllama replays recorded passes only while the shape stays
)
REPEATS = 3  # fewest repetitions of a finished profile
MOST_REPEATS = 7
OUT_OF_LINE = 1.05  # a pass this many times dearer than its neighbours' say is timed again: less moves no decision
CONFIRMATIONS = 6  # times at most that those are timed again: a curve may really be jagged
WIDE = 0.2  # quartiles further apart than this share of the median: the machine is busy, the profile is not kept
SHALLOW, DEEP = 32, 512  # cached tokens at which passes are measured
SEVERAL = 8  # sequences at most whose shared drafts are measured: what more of them cost goes on from there
TAKEN_IN = 2  # tokens of a sequence whose features a round hands over, about
HEADER_BYTES = 1 << 20
# Widths of passes, most telling first; the widest that a drafter asks for goes between.
FIRST_WIDTHS = (1, 2, 4, 3)
MORE_WIDTHS = (6, 5, 8, 7, 12, 10, 9, 14, 11, 13, 15, 16, 24, 32, 48, 64, 96, 128, 256, 512)

Notice = Callable[[str], None]
Progress = Callable[[float], None]


def budget_s() -> float:
    """Seconds a profile may take; DSPARK_PROFILE_SECONDS overrides the default."""
    try:
        return max(0.0, float(os.environ.get("DSPARK_PROFILE_SECONDS", BUDGET_S)))
    except ValueError:
        return BUDGET_S


class Job(NamedTuple):
    """One thing to time: a pass of `kind` (verify, draft, inject) with `depth` cached tokens in each of `sequences`.

    tokens: verified, asked for or handed over, by each sequence
    """

    kind: str
    depth: int
    tokens: int
    sequences: int = 1


@dataclass
class Profile:
    """Samples in ms of every job, and what follows from them."""

    samples: dict[Job, list[float]] = field(default_factory=dict)
    depths: tuple[int, int] = (SHALLOW, SHALLOW)
    crowded: bool = False  # see TargetInfo
    settled: bool = False  # whether every pass was timed after others of its width
    switched: list[float] = field(default_factory=list)  # ms of plain passes after one of another width

    def add(self, job: Job, ms: float) -> None:
        if ms > 0:  # a clock that stood still or went back measured nothing
            self.samples.setdefault(job, []).append(ms)

    def ms(self, kind: str, depth: int, sequences: int = 1) -> dict[int, float]:
        """Tokens -> ms when nobody disturbs: the quickest repetition, since neighbours come in bursts and only ever add."""
        wanted = (kind, depth, sequences)
        return {j.tokens: min(s) for j, s in self.samples.items() if (j.kind, j.depth, j.sequences) == wanted}

    @property
    def repeats(self) -> int:
        return min((len(s) for s in self.samples.values()), default=0)

    @property
    def spread(self) -> float:
        """Median over jobs of the distance of the quartiles, as a share of the median."""
        wide = [np.subtract(*np.percentile(s, [75, 25])) / median(s) for s in self.samples.values() if len(s) >= 2]
        return float(np.median(wide)) if wide else float("inf")

    @property
    def doubt(self) -> str | None:
        """Why it may not be kept for later sessions; None = it may."""
        if self.repeats < REPEATS - 1:
            return "not every pass could be timed twice"
        return None if self.spread <= WIDE else f"the machine is busy (times differ by {self.spread:.0%})"

    def costs(self) -> CostModel:
        """Raises ValueError when nothing was measured."""
        shallow = self.depths[0]
        drafts = self.ms("draft", shallow)
        most = max((job.sequences for job in self.samples), default=1)
        shared = self.ms("draft", shallow, most) if most > 1 else {}
        inject = {j.sequences: min(s) for j, s in self.samples.items() if j.kind == "inject"}
        verify = self.ms("verify", shallow)
        switch = self.switch_ms
        if not self.settled:  # each was timed after a pass of another width, the plain one after its like
            verify = {n: ms - switch * (n > 1) for n, ms in verify.items()}
        if 1 in verify:  # curves are jagged, but no pass of more tokens does less work than a plain one
            verify[1] = min(verify.values())
        return CostModel(
            Curve(verify),
            depth=shallow,
            slope=self._slope("verify"),
            crowded=self.crowded,
            draft=Curve(drafts) if drafts else None,
            several=(most, Curve(shared)) if drafts and shared else None,
            draft_slope=self._slope("draft"),
            inject=Curve(inject) if inject else None,
            switch_ms=switch,
        )

    @property
    def switch_ms(self) -> float:
        """What a pass takes longer after one of another width, when nobody disturbs either; at most half of a plain one."""
        plain = self.ms("verify", self.depths[0]).get(1)
        if plain is None or not self.switched:
            return 0.0
        return min(max(0.0, min(self.switched) - plain), 0.5 * plain)

    def out_of_line(self) -> list[Job]:
        """Jobs clearly above the line through their nearest two neighbours in tokens, the farthest above it first.

        So lies a jag of the machine, and so a job of which every repetition was disturbed: only timing it again can tell.
        """
        found: dict[Job, float] = {}
        for kind, depth, sequences in {(j.kind, j.depth, j.sequences) for j in self.samples}:
            points = sorted(self.ms(kind, depth, sequences).items())
            for i, (n, ms) in enumerate(points if len(points) > 2 else []):
                first = min(max(i - 1, 0), len(points) - 3)  # of the three that lie nearest
                (a, ms_a), (b, ms_b) = (p for p in points[first : first + 3] if p[0] != n)
                line = ms_a + max(0.0, ms_b - ms_a) * (n - a) / (b - a)
                if ms > OUT_OF_LINE * line:
                    found[Job(kind, depth, n, sequences)] = line / ms
        return sorted(found, key=lambda job: found[job])

    def _slope(self, kind: str) -> tuple[float, float]:
        """ms per cached token: a line over the pass's tokens; 0 where the difference is within the noise."""
        shallow, deep = self.depths
        near, far = self.ms(kind, shallow), self.ms(kind, deep)
        widths = sorted(set(near) & set(far)) if deep > shallow else []
        noise = self.spread
        slopes = [(far[n] - near[n]) / (deep - shallow) if far[n] > near[n] * (1 + noise) else 0.0 for n in widths]
        if not any(slopes):
            return (0.0, 0.0)
        if len(widths) == 1:
            return (slopes[0], 0.0)
        per_token, fixed = np.polyfit(widths, slopes, 1)
        return (max(0.0, float(fixed)), max(0.0, float(per_token)))


def measure(
    target: Target,
    drafter: Drafter | None,
    *,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> Profile:
    """Profile a pair in about `seconds`. Uses, and leaves empty, the first `SEVERAL` sequences of both.

    Interleaved: every repetition takes all widths in turn, forth and back, so that drift hits them alike. As in a verify pass
    libllama then builds a graph for another width than the last; plain passes follow one another, so a plain one is run before,
    which tells what building a graph takes.
    A width that is measured too dear is never tried, so no round would mend it: what is out of line is timed more often.
    """
    seconds = budget_s() if seconds is None else seconds
    bench = _Bench(target, drafter, clock)
    profile = Profile(crowded=target.info.crowded, settled=bench.settling > 0)
    end = clock() + seconds
    if progress is not None:
        bench.tell = lambda: progress(min(1.0, max(0.0, 1.0 - (end - clock()) / seconds)) if seconds else 1.0)
    try:
        depth = bench.fill_all(min(SHALLOW, target.info.n_ctx // 4))
        profile.depths = (depth, depth)
        end += bench.record([Job("verify", depth, 1)])
        first = max(bench.verify(1) for _ in range(2))  # warm: the first passes build graphs and wake threads
        jobs = [
            Job("verify", depth, n)
            for n in _affordable(bench.widths(), first, 0.5 * seconds * 1e3 / (1 + bench.settling))
        ]
        jobs += bench.drafting(depth)
        end += bench.record(jobs)
        plain = jobs.pop(0)
        jobs.insert(len(jobs) // 2, plain)  # never twice in a row: one burst would spoil both
        bench.sample(profile, jobs, REPEATS, clock() + seconds)
        bench.sample(profile, jobs, MOST_REPEATS - REPEATS, end - 0.4 * seconds)
        end += bench.confirm(profile, plain, 0.15 * seconds)
        deep = bench.fill(min(DEEP, target.info.n_ctx // 2), until=end - 0.2 * seconds)
        profile.depths = (depth, deep)
        if deep >= depth + 64:
            telling = {"verify": (1, 4, bench.widest), "draft": (1, bench.pass_block)}
            far = [
                Job(j.kind, deep, j.tokens) for j in jobs if j.sequences == 1 and j.tokens in telling.get(j.kind, ())
            ]
            end += bench.record(far)
            bench.sample(profile, far, REPEATS, end)
            profile.samples = {j: s for j, s in profile.samples.items() if len(s) >= 2 or j.depth == depth}
    finally:
        bench.clean()
    return profile


def _affordable(widths: Sequence[int], first_ms: float, budget_ms: float) -> list[int]:
    """As many of `widths` (most telling first) as can be repeated within the budget, if width 1 takes `first_ms`."""
    chosen: list[int] = []
    for n in widths:
        budget_ms -= REPEATS * first_ms * (1 + 0.3 * (n - 1))
        if budget_ms < 0 and len(chosen) >= 3:
            break
        chosen.append(n)
    return sorted(chosen)


class _Bench:
    """Single passes on sequence 0, and drafts of several sequences, each undone after it was timed."""

    def __init__(self, target: Target, drafter: Drafter | None, clock: Callable[[], float]) -> None:
        self.target, self.drafter, self.clock = target, drafter, clock
        self.tell: Callable[[], None] = lambda: None  # after each pass; may raise to end the measurement
        self._ids = np.random.default_rng(0).integers(0, target.info.n_vocab, size=4096).tolist()
        self.widest = min((drafter.block_size if drafter else 0) + 1, target.max_rows)
        self.pass_block = drafter.pass_block if drafter is not None and drafter.has_pass else 0
        self._sequences = min(SEVERAL, target.info.n_seq) if self.pass_block else 1
        self.last: Job | None = None  # that was sampled
        self.settling = SETTLING if target.info.backend == "llamacpp" and target.info.device != "cpu" else 0

    def widths(self) -> list[int]:
        """Tokens per pass worth measuring, most telling first; with several sequences also what all of them may need."""
        most = min(self.widest * self.target.info.n_seq, self.target.max_rows)
        order = (*FIRST_WIDTHS, self.widest, *MORE_WIDTHS, most)
        return list(dict.fromkeys(n for n in order if n <= most))

    def drafting(self, depth: int) -> list[Job]:
        """What is to be known of the drafter's pass, warm."""
        if not self.pass_block:
            return []
        assert self.drafter is not None
        jobs = [Job("draft", depth, n) for n in sorted({1, (self.pass_block + 1) // 2, self.pass_block})]
        jobs += [Job("inject", depth, TAKEN_IN)]
        if self._sequences > 1:
            jobs += [Job("draft", depth, n, self._sequences) for n in sorted({1, self.pass_block})]
            jobs += [Job("inject", depth, TAKEN_IN, self._sequences)]
        for sequences in {1, self._sequences}:
            self.draft(1, sequences)
            self.inject(TAKEN_IN, sequences)
        return jobs

    def fill_all(self, depth: int) -> int:
        """`fill` every sequence that is measured; the drafter's are not forked: each has as many cells of its own."""
        length = self.fill(depth, sequences=self._sequences)
        for seq in range(1, self._sequences):
            self.target.fork(0, seq)
        return length

    def fill(self, depth: int, *, sequences: int = 1, until: float = float("inf")) -> int:
        """Grow sequence 0 of the target, and as many as `sequences` of the drafter, to `depth` tokens or as far as time
        allows; returns the length."""
        while (length := self.target.length(0)) < depth and self.clock() < until:
            chunk = self._ids[length : min(depth, length + 64)]
            output = self.target.step([Row(0, chunk, n_logits=1)])[0]
            if self.drafter is not None:
                for seq in range(sequences):
                    self.drafter.observe(seq, chunk, output.features)
        if self.pass_block:
            self.draft(1, 1)  # takes in what waits
        return self.target.length(0)

    def run(self, job: Job) -> float:
        """ms of one job."""
        if job.kind == "verify":
            return self.verify(job.tokens)
        return (self.draft if job.kind == "draft" else self.inject)(job.tokens, job.sequences)

    def verify(self, tokens: int) -> float:
        length, native, began = self.target.length(0), self.target.native_ms, self.clock()
        self.target.step([Row(0, self._ids[:tokens])])
        wall = (self.clock() - began) * 1e3
        self.target.rewind(0, length)
        return (self.target.native_ms - native) or wall

    def draft(self, block: int, sequences: int) -> float:
        assert self.drafter is not None
        began = self.clock()
        self.drafter.propose([DraftRequest(seq, self._ids[1], block) for seq in range(sequences)])
        return (self.clock() - began) * 1e3

    def inject(self, tokens: int, sequences: int) -> float:
        """Handing over features, through `propose` where the drafter puts it off."""
        assert self.drafter is not None
        length, ids = self.target.length(0), self._ids[:tokens]
        outputs = self.target.step([Row(seq, ids, n_logits=1) for seq in range(sequences)])
        delayed, began = self.drafter.inject_ms, self.clock()
        for seq, output in enumerate(outputs):
            self.drafter.observe(seq, ids, output.features)
        wall = (self.clock() - began) * 1e3
        self.draft(1, sequences)
        for seq in range(sequences):
            self.target.rewind(seq, length)
            self.drafter.rewind(seq, length)
        return wall + self.drafter.inject_ms - delayed

    def record(self, jobs: Sequence[Job]) -> float:
        """Seconds that it took to run `jobs` once, where the target records passes: many times what a replay takes.

        That is paid once a shape and is no cost of a pass; it also would make the machine look busy.
        """
        if self.target.info.details.get("capture", "off") == "off":
            return 0.0
        began = self.clock()
        for job in jobs:
            self.run(job)
        return self.clock() - began

    def sample(self, profile: Profile, jobs: Sequence[Job], repeats: int, until: float) -> None:
        for repeat in range(repeats):
            for job in jobs if repeat % 2 == 0 else list(reversed(jobs)):
                if self.clock() >= until:
                    return
                plain = job.kind == "verify" and job.tokens == 1
                if job == self.last and job.kind == "verify" and not plain and not self.settling:
                    self.verify(1)  # at the turn: timed after another width, as ever
                before = [self.run(job) for _ in range(max(self.settling, int(plain)))]
                ms = self.run(job)
                profile.add(job, ms)
                if plain and job.depth == profile.depths[0] and self.last not in (None, job) and before[0] > 0:
                    profile.switched.append(before[0])
                self.last = job
                self.tell()

    def confirm(self, profile: Profile, plain: Job, seconds: float) -> float:
        """Time again what is out of line, beside a plain pass, as long as it stays so; returns the seconds it took."""
        began = self.clock()
        for _ in range(CONFIRMATIONS):
            doubtful = profile.out_of_line()
            if not doubtful:
                break
            self.sample(profile, [plain, *(job for job in doubtful if job != plain)], 1, began + seconds)
        return self.clock() - began

    def clean(self) -> None:
        """Leave nothing behind."""
        for seq in range(self._sequences):
            self.target.drop(seq)
            if self.drafter is not None:
                self.drafter.drop(seq)


# -- the cache -----------------------------------------------------------------------------------------------------------


def file_facts(path: Path | None) -> dict[str, Any] | None:
    """What tells one version of a file from another, without reading all of it; of a checkpoint folder its files'."""
    if path is not None and path.is_dir():
        parts = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        return {"files": [file_facts(part) for part in parts]}
    if path is None or not path.is_file():
        return None
    facts = path.stat()
    with path.open("rb") as file:
        header = hashlib.sha256(file.read(HEADER_BYTES)).hexdigest()
    return {"file": path.name, "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns, "header_sha256": header}


@dataclass(frozen=True)
class Place:
    """Where the profile of a pair is kept (`path`), and what must be the same for it to count (`key`)."""

    path: Path
    key: dict[str, Any]

    @classmethod
    def of(cls, target: Target, drafter: Drafter | None, drafter_path: Path | None) -> Place:
        info = target.info
        library = "llama-cpp-python" if info.backend == "llamacpp" else "torch"
        settings = {
            "backend": info.backend,
            "device": info.device,
            "n_seq": info.n_seq,
            "drafter": None if drafter is None else drafter.name,
            "block_size": None if drafter is None else drafter.block_size,
            **{k: v for k, v in info.details.items() if isinstance(v, str | int | float | type(None))},
        }
        key = {
            **settings,
            "machine": f"{platform.node()} {processor()} {os.cpu_count()}",
            "library": f"{library} {installed(library)}",
            "model": file_facts(Path(info.path)),
            "drafter_file": file_facts(drafter_path),
        }
        where = [str(Path(info.path).absolute()), str(drafter_path and drafter_path.absolute()), settings]
        name = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:24]
        return cls(user_cache_path("dspark") / "profiles" / f"{name}.json", key)

    def load(self, notice: Notice) -> CostModel | None:
        """The profile kept here, if it is for this key; one line of notice when a file is there that cannot be used."""
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            notice(f"the cost profile {self.path.name} cannot be read ({_short(error)}): measuring again")
            return None
        try:
            if raw["schema"] != SCHEMA:
                notice(f"the cost profile {self.path.name} is of another version of dspark: measuring again")
                return None
            if raw["key"] != json.loads(json.dumps(self.key)):
                changed = next(k for k in {**self.key, **raw["key"]} if self.key.get(k) != raw["key"].get(k))
                notice(f"the cost profile {self.path.name} is of another {changed.replace('_', ' ')}: measuring again")
                return None
            return CostModel.from_dict(raw["costs"])
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
            notice(f"the cost profile {self.path.name} is damaged ({_short(error)}): measuring again")
            return None

    def save(self, profile: Profile) -> None:
        """Keep a profile; in one move, so that nobody ever reads half of it. A folder that cannot be written is no error."""
        raw = {"schema": SCHEMA, "key": self.key, "costs": profile.costs().as_dict(), "spread": profile.spread}
        unfinished = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(raw, indent=1), encoding="utf-8")
            unfinished.replace(self.path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def costs_of(
    target: Target, drafter: Drafter | None, place: Place, notice: Notice, progress: Progress | None = None
) -> CostModel:
    """The costs of a loaded pair: kept at `place` from earlier, or measured now (`progress` hears how far, and may raise)."""
    known = place.load(notice)
    if known is not None:
        return known
    seconds = budget_s()
    if seconds >= 1:
        notice(f"measuring what passes cost on this machine (once, about {seconds:.0f} s)")
    profile = measure(target, drafter, seconds=seconds, progress=progress)
    try:
        costs = profile.costs()
    except ValueError:
        return CostModel.unmeasured()
    if profile.doubt is None:
        place.save(profile)
    elif seconds >= 1:
        notice(f"{profile.doubt}: this measurement is not kept")
    return costs


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]
