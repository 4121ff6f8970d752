"""What a drafter's confidences are worth: beliefs that rounds correct, and the calibration files that they start from.

The files are shipped beside a drafter or written by `dspark calibrate`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_data_path

from dspark_cli.backends.base import Draft
from dspark_cli.engine.admission import Numbers
from dspark_cli.engine.calibration import OnlinePlatt, PositionHistory, Sts, logit, logit_of
from dspark_cli.engine.profile import Notice
from dspark_cli.engine.schedule import Outcome

SCHEMA = "dspark-calibration/1"
NOTHING: Numbers = ()


@dataclass
class Belief:
    """What one drafter's confidences are worth: its STS temperatures, then what its own recent rounds say.

    survival: mean survival by position from earlier runs (shipped, or from `dspark calibrate`); () if unknown
    learns:   whether recent rounds correct it; not where the drafter's confidence is a record of its recent rounds itself
    """

    sts: Sts = field(default_factory=Sts)
    survival: tuple[float, ...] = ()
    learns: bool = True
    platt: OnlinePlatt = field(default_factory=OnlinePlatt)
    history: PositionHistory = field(default_factory=PositionHistory)

    def of(self, drafts: Sequence[Draft]) -> tuple[list[Numbers], list[Numbers]]:
        """(survivals [k], logits [k] of the confidences after STS) of drafts that are not empty.

        The logits are what `learn` needs: empty where nothing is learned.
        """
        if not self.learns and not self.sts.temperatures and all(d.confidence is not None for d in drafts):
            return [products(d.confidence.tolist()) for d in drafts], [NOTHING] * len(drafts)  # type: ignore[union-attr]
        if len(drafts) == 1 and drafts[0].confidence is not None:  # a single request: as quick as it can be
            x = self.sts.divided([logit_of(c) for c in drafts[0].confidence.tolist()])
            return [products(self.platt.of(x))], [x]
        sizes = [len(draft) for draft in drafts]
        width = max(sizes)
        if any(d.confidence is None for d in drafts):
            mean = self.history.upto(width)
            joined, conditional = logit(mean), mean
            bounds = [slice(0, n) for n in sizes]
        else:
            joined = logit(np.concatenate([d.confidence for d in drafts]))  # type: ignore[misc]
            if self.sts.temperatures:
                temperatures = self.sts.upto(width)
                joined = joined / np.concatenate([temperatures[:n] for n in sizes])
            conditional = self.platt(joined)
            ends = list(itertools.accumulate(sizes))
            bounds = [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]
        return [conditional[where].cumprod().tolist() for where in bounds], [joined[where].tolist() for where in bounds]

    def learn(self, seen: Sequence[tuple[Outcome, Numbers]]) -> None:
        """Outcomes of one round with the logits they were judged by."""
        logits: list[float] = []
        happened: list[float] = []
        for outcome, x in seen:
            reached = min(outcome.judged, outcome.kept + 1)
            if outcome.draft.confidence is None:
                self.history.update(reached, outcome.kept)
                continue
            logits += x[:reached]
            happened += [1.0] * outcome.kept + [0.0] * (reached - outcome.kept)
        if logits and self.learns:
            self.platt.update(logits, happened)


def products(conditional: Iterable[float]) -> list[float]:
    """Survivals from the chance of each token, given those before it."""
    return list(itertools.accumulate(conditional, operator.mul))


@dataclass(frozen=True)
class CalibrationFile:
    """What a calibration file says.

    drafter_sha256: of the drafter file it was fitted for
    source:         the drafter's kind ("dspark", "dflash", ...)
    temperatures:   STS by position
    survival:       share of rounds in which a position was accepted, by position; may be ()
    rounds:         how many rounds it was fitted on
    """

    drafter_sha256: str
    source: str
    temperatures: tuple[float, ...]
    survival: tuple[float, ...] = ()
    rounds: int = 0

    def belief(self) -> Belief:
        return Belief(Sts(self.temperatures), self.survival)

    def save(self, path: Path) -> None:
        """Write in one move. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        unfinished.write_text(json.dumps({"schema": SCHEMA, **vars(self)}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> CalibrationFile:
        """Raises OSError, or ValueError that says what is wrong."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw["schema"] != SCHEMA:
                raise ValueError(f"schema {raw['schema']!r}, not {SCHEMA!r}")
            temperatures = tuple(map(float, raw["temperatures"]))
            survival = tuple(map(float, raw.get("survival", ())))
            if not all(0.0 < t < 100.0 for t in temperatures) or not all(0.0 <= s <= 1.0 for s in survival):
                raise ValueError("temperatures or survivals out of range")
            return cls(
                str(raw["drafter_sha256"]), str(raw["source"]), temperatures, survival, int(raw.get("rounds", 0))
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def shipped_path(drafter: Path) -> Path:
    return drafter.with_name(drafter.name + ".calibration.json")


def own_path(drafter: Path) -> Path:
    """Where `dspark calibrate` writes: by name and size, so that the drafter is hashed only if there is something to check."""
    return user_data_path("dspark") / "calibrations" / f"{drafter.stem}-{drafter.stat().st_size:x}.json"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_beliefs(drafter: Path | None, notice: Notice) -> dict[str, Belief]:
    """Beliefs about the drafter in this file: the user's own calibration if there is one, else the shipped one."""
    if drafter is None or not drafter.is_file():
        return {}
    for path in (own_path(drafter), shipped_path(drafter)):
        try:
            found = CalibrationFile.load(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            notice(f"the calibration {path.name} cannot be used ({error}): confidences are taken as they are")
            continue
        if found.drafter_sha256 != sha256_of(drafter):
            notice(f"the calibration {path.name} is for another version of {drafter.name}: not used")
            continue
        return {found.source: found.belief()}
    return {}
