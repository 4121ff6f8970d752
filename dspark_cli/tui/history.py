"""What was typed before, also in earlier sessions. No Textual."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

KEPT = 500
LONGEST = 20_000  # characters: a pasted book is not worth keeping


class History:
    """Entries, oldest first, in a file of one JSON string a line; a file that cannot be read or written is no error.

    `older` and `newer` walk through it; what was being typed comes back at the end.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.entries: list[str] = []
        self._at = 0
        self._draft = ""
        if file is not None:
            with suppress(OSError, UnicodeDecodeError):
                self.entries = [e for line in file.read_text(encoding="utf-8").splitlines() if (e := _entry(line))]
        self.entries = self.entries[-KEPT:]
        self._at = len(self.entries)

    def add(self, text: str) -> None:
        """Something was sent."""
        if text.strip() and len(text) <= LONGEST and (not self.entries or self.entries[-1] != text):
            self.entries.append(text)
            del self.entries[:-KEPT]
            self._write()
        self._at = len(self.entries)

    def older(self, typed: str) -> str | None:
        """The entry before the current one; None at the beginning. typed: what stands in the input now."""
        if self._at == 0:
            return None
        if self._at == len(self.entries):
            self._draft = typed
        self._at -= 1
        return self.entries[self._at]

    def newer(self) -> str | None:
        """The entry after the current one, at last what was being typed; None if that is what is shown."""
        if self._at >= len(self.entries):
            return None
        self._at += 1
        return self._draft if self._at == len(self.entries) else self.entries[self._at]

    def _write(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text("".join(json.dumps(e) + "\n" for e in self.entries), encoding="utf-8")


def _entry(line: str) -> str | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, str) else None
