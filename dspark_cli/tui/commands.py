"""Everything that can be done in the window: by key, as /command, from the palette. One table, no Textual."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_cli.backends.errors import BadInput


@dataclass(frozen=True)
class Command:
    """name: typed as /name.  keys: Textual's words, () for none.  takes: what its argument is, "" for none.

    asks: without an argument, ask for one in a dialog
    footer: worth a place in the bottom line
    """

    name: str
    help: str
    keys: tuple[str, ...] = ()
    takes: str = ""
    asks: bool = False
    footer: str = ""


COMMANDS = (
    Command("help", "keys and commands", ("f1",), footer="help"),
    Command("panel", "show or hide the panel", ("f2",), footer="panel"),
    Command("colours", "colour tokens by where they came from", ("f3",), footer="colours"),
    Command("race", "decode the last answer again without drafting, and compare", ("f4",), footer="race"),
    Command("retry", "answer the last question again", ("f5",), footer="retry"),
    Command("edit", "take the last question back to edit it", ("f6",), footer="edit"),
    Command("copy", "copy the last answer to the clipboard", ("f7",)),
    Command("theme", "another theme: the next one, or NAME", ("f8",), takes="NAME"),
    Command("stop", "stop the answer, the race or the loading", ("escape",), footer="stop"),
    Command("new", "forget the conversation; the system prompt stays", ("ctrl+n",)),
    Command("save", "save the conversation: FILE.json, or FILE.md as Markdown", ("ctrl+s",), "FILE", asks=True),
    Command("load", "go on with a saved conversation", ("ctrl+o",), "FILE", asks=True),
    Command("system", "set the system prompt (- removes it); the conversation goes on under it", (), "TEXT", asks=True),
    Command("temperature", "0 is greedy, higher is more varied", (), "NUMBER", asks=True),
    Command("policy", "auto, off, fixed:N or threshold:P", (), "POLICY", asks=True),
    Command("drafter", "auto, lookup, none, or the path of a drafter GGUF", (), "NAME|PATH", asks=True),
    Command("quit", "leave; the conversation is kept", ("ctrl+q",), footer="quit"),
)
BY_NAME = {command.name: command for command in COMMANDS}
#: other words people type for the same
ALIASES = {
    "reset": "new",
    "exit": "quit",
    "regenerate": "retry",
    "colors": "colours",
    "temp": "temperature",
    "t": "temperature",
}

#: keys of the input itself, for the help screen
TYPING = (
    ("enter", "send"),
    ("ctrl+j, alt+enter, or \\ at the end of a line", "a new line"),
    ("up, down", "what was sent before (at the first and last line)"),
    ("pageup, pagedown", "scroll the conversation"),
    ("ctrl+c", "stop an answer; twice: leave"),
    ("ctrl+p", "command palette"),
    ("ctrl+l", "draw the window again"),
)


def parse(line: str) -> tuple[Command, str] | None:
    """The command of a line that is one, with its argument; None for a message.

    Raises BadInput for a word after / that is no command. "/usr/bin" and "/ 2" are messages.
    """
    name, _, rest = line.strip().partition(" ")
    if "\n" in line or not name.startswith("/") or not name[1:].isalpha():
        return None
    word = name[1:].lower()
    command = BY_NAME.get(ALIASES.get(word, word))
    if command is None:
        raise BadInput(f"unknown command {name}", hint="/help lists them")
    return command, rest.strip()
