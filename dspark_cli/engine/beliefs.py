"""Calibration files: what earlier rounds taught about a drafter, shipped beside it or written by `dspark calibrate`."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from dspark_cli.engine.auto import Belief
from dspark_cli.engine.calibration import Sts
from dspark_cli.engine.profile import Notice

SCHEMA = "dspark-calibration/1"


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
