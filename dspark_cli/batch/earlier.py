"""What an earlier run left: which items are done, and which results are of items that are not there any more."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.batch.items import Item
from dspark_cli.batch.journal import Entry, Journal, read_entry


@dataclass(frozen=True)
class Known:
    """What is remembered of an item of the input: enough to tell whether it is done, not what it says."""

    key: str
    file: str
    line: int


def scan(items: Iterable[Item]) -> list[Known]:
    """All items of the input in order. Raises BadInput when two have the same id."""
    known: list[Known] = []
    ids: dict[str | int, int] = {}
    twice: list[tuple[str | int, int, int]] = []
    for item in items:
        known.append(Known(item.key, str(item.file), item.line))
        if item.id is not None and (first := ids.setdefault(item.id, item.number)) != item.number:
            twice.append((item.id, first, item.number))
    if twice:
        name, first, second = twice[0]
        places = " and ".join(f"{known[n].file}:{known[n].line}" for n in (first, second))
        more = f"; {len(twice) - 1} more ids are not unique" if len(twice) > 1 else ""
        raise BadInput(
            f"the id {json.dumps(name)} is used twice: {places}{more}", hint="ids of their own, or none at all"
        )
    return known


def match(known: Sequence[Known], entries: Sequence[Entry]) -> tuple[dict[int, Entry], list[Entry]]:
    """(item number -> its result, results of nothing): by content, and of equal ones by place first."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_key[entry.key].append(entry)
    found: dict[int, Entry] = {}
    for exact in (True, False):
        for number, item in enumerate(known):
            left = by_key.get(item.key)
            if number in found or not left:
                continue
            same = next((e for e in left if (e.file, e.line) == (item.file, item.line)), None) if exact else left[0]
            if same is not None:
                left.remove(same)
                found[number] = same
    return found, [entry for left in by_key.values() for entry in left]


def take_up(
    journal: Journal, known: Sequence[Known], settings: str, say: Callable[[str], None], *, retry_errors: bool
) -> dict[int, Entry]:
    """Item number -> its result of earlier runs. Leaves nothing else in the journal, and says what it found.

    Raises BadInput when the results were made with other settings.
    """
    if journal.repaired:
        say(f"the last line of {journal.path.name} was unfinished ({journal.repaired} bytes): cut off")
    entries, damaged = journal.entries()
    if damaged:
        say(f"{damaged} lines of {journal.path.name} are damaged: their items are done again")
    other = next((e for e in entries if e.settings != settings), None)
    if other is not None:
        raise BadInput(
            f"{journal.path} was made with another model, template or other options that change the answers"
            f" ({other.file}:{other.line})",
            hint="the options of that run, or another file for -o",
        )
    done, stale = match(known, entries)
    if stale:
        aside = _set_aside(journal.path, stale)
        say(
            f"the input changed: {len(stale)} results are of items that are not in it any more"
            f" ({stale[0].file}:{stale[0].line} first): moved to {aside.name}"
        )
    if retry_errors:
        done = {number: entry for number, entry in done.items() if not entry.failed}
    if damaged or len(done) < len(entries) or any(not _in_place(known[n], e) for n, e in done.items()):
        done = _keep(journal, known, done)
    return done


def _in_place(item: Known, entry: Entry) -> bool:
    return (entry.file, entry.line) == (item.file, item.line)


def _keep(journal: Journal, known: Sequence[Known], done: dict[int, Entry]) -> dict[int, Entry]:
    """Rewrite the journal with the results in `done` only, each with the place where its item stands now."""
    of = {entry: number for number, entry in done.items()}

    def mend(entry: Entry, result: dict[str, Any]) -> bool:
        item = known[of[entry]]
        result["file"], result["line"] = item.file, item.line
        return not _in_place(item, entry)

    numbers = [of[entry] for entry in sorted(done.values(), key=lambda e: e.offset)]
    journal.rewrite([done[number] for number in numbers], mend)
    kept, _ = journal.entries()
    return dict(zip(numbers, kept, strict=True))


def _set_aside(path: Path, stale: Sequence[Entry]) -> Path:
    """Results that belong to nothing any more are kept beside the journal: they were paid for."""
    aside = path.with_name(f"{path.name}.stale")
    try:
        with path.open("rb") as source, aside.open("ab") as out:
            for entry in stale:
                out.write(read_entry(source, entry))
    except OSError as error:
        raise DsparkError(f"{aside} cannot be written: {error.strerror}") from None
    return aside
