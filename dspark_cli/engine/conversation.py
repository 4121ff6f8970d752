"""A conversation: its messages, and files of them. What the terminal UI and the plain REPL both keep."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import DsparkError

ROLES = ("system", "user", "assistant")
#: a line that begins a message in a Markdown file; text that looks like one is saved with a backslash in front
_MARK = re.compile(r"\*\*(system|user|assistant)\*\*")
_ESCAPED = re.compile(r"\\+\*\*(system|user|assistant)\*\*")

Message = dict[str, str]


@dataclass
class Conversation:
    """Messages so far (`role`, `content`), the system prompt apart. The last one is the user's until it is answered."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def all_messages(self) -> list[Message]:
        """Everything as a chat template takes it."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages]

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    @property
    def waiting(self) -> bool:
        """Whether the last message is a question that has no answer yet."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    @property
    def last_answer(self) -> str | None:
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), None)

    def drop_answer(self) -> bool:
        """Forget the last answer, so that its question waits again. Returns whether there is a question at all."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self.waiting

    def take_back(self) -> str | None:
        """Forget the last question and its answer; returns the question, to be edited."""
        return self.messages.pop()["content"] if self.drop_answer() else None

    def reset(self) -> None:
        """Forget every message; the system prompt stays."""
        self.messages.clear()

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write the conversation: JSON for `.json`, anything else is Markdown. Raises DsparkError where it cannot."""
        text = self.as_json() if file.suffix.lower() == ".json" else self.as_markdown()
        file = file.expanduser()
        unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            # Half a surrogate pair, which a terminal may send, has no UTF-8: it becomes "?".
            unfinished.write_bytes(text.encode("utf-8", errors="replace"))
            unfinished.replace(file)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise DsparkError(f"{file} cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, file: Path) -> Conversation:
        """Read what `save` wrote, or any JSON list of messages. Raises DsparkError that says what is wrong with the file."""
        file = file.expanduser()
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise DsparkError(f"{file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DsparkError(f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
        if file.suffix.lower() == ".json":
            return cls.of(_from_json(text, file), str(file))
        return cls.of(_from_markdown(text.replace("\r\n", "\n")), str(file))

    @classmethod
    def of(cls, messages: list[Any], where: str) -> Conversation:
        """A conversation of plain dicts. Raises DsparkError with the number of the first message that is none."""
        found: list[Message] = []
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise DsparkError(f"{where}: message {number} has no text under `content`")
            if message.get("role") not in ROLES:
                raise DsparkError(
                    f"{where}: message {number} has the role {message.get('role')!r}, not one of {', '.join(ROLES)}"
                )
            if message["role"] == "system" and number > 1:
                raise DsparkError(f"{where}: message {number} is a system prompt; only the first message may be one")
            found.append({"role": message["role"], "content": message["content"]})
        if not found:
            raise DsparkError(f"{where} holds no messages", hint="a file that /save wrote, .json or .md")
        system = found.pop(0)["content"] if found[0]["role"] == "system" else None
        return cls(system, found)

    def as_json(self) -> str:
        return json.dumps(self.all_messages(), ensure_ascii=False, indent=2) + "\n"

    def as_markdown(self) -> str:
        return "\n\n".join(f"**{m['role']}**\n\n{_escaped(m['content'])}" for m in self.all_messages()) + "\n"


def _escaped(text: str) -> str:
    return "\n".join(
        "\\" + line if _MARK.fullmatch(line) or _ESCAPED.fullmatch(line) else line for line in text.split("\n")
    )


def _from_json(text: str, file: Path) -> list[Any]:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise DsparkError(f"{file} is not JSON: {error}") from None
    except RecursionError:
        raise DsparkError(f"{file} is nested too deeply to be a conversation") from None
    if isinstance(raw, dict):
        raw = raw.get("messages")
    if not isinstance(raw, list):
        raise DsparkError(f"{file} holds no list of messages", hint="a file that /save wrote, .json or .md")
    return raw


def _from_markdown(text: str) -> list[Message]:
    """Messages between marker lines; what stands before the first marker is no message."""
    messages: list[tuple[str, list[str]]] = []
    for line in text.removesuffix("\n").split("\n"):
        mark = _MARK.fullmatch(line)
        if mark:
            messages.append((mark[1], []))
        elif messages:
            messages[-1][1].append(line[1:] if _ESCAPED.fullmatch(line) else line)
    last = len(messages) - 1
    # A blank line follows every marker, and one stands before it.
    return [
        {"role": role, "content": "\n".join(lines[1 : len(lines) if i == last else -1])}
        for i, (role, lines) in enumerate(messages)
    ]
