"""Leaving in good order: signals, a terminal that went away, and failures nobody expected. No Textual."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from dspark_cli.engine.kept import state_folder

PATIENCE_S = 3.0
LOOK_EVERY_S = 1.0
SIGNALS = ("SIGHUP", "SIGTERM")


def on_signals(leave: Callable[[int], None], interrupted: Callable[[], None]) -> None:
    """Call `leave(exit code)` when the terminal closes or somebody ends the program, `interrupted` for SIGINT.

    Must be called in the event loop of the main thread; elsewhere (tests, Windows) it does nothing.
    """
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError, RuntimeError, ValueError):
        for name in SIGNALS:
            number = getattr(signal, name)
            loop.add_signal_handler(number, leave, 128 + number)
        loop.add_signal_handler(signal.SIGINT, interrupted)


def terminal_gone() -> bool:
    """Whether standard input was a terminal whose other side is closed; not every such program gets a hang-up signal."""
    try:
        import termios
    except ImportError:
        return False
    try:
        termios.tcgetattr(0)
    except termios.error as error:
        return error.args[0] == errno.EIO
    return False


def on_terminal_gone(gone: Callable[[], None]) -> Callable[[], None]:
    """Call `gone` once, from a thread of its own: writing to a terminal that is gone may block the main thread for ever.

    Returns what ends the watching.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY_S):
            if terminal_gone():
                gone()
                return

    threading.Thread(target=watch, daemon=True).start()
    return over.set


def surely_end(code: int) -> None:
    """End the process even if writing to a terminal that is gone blocks for ever."""

    def end() -> None:
        time.sleep(PATIENCE_S)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def record(error: BaseException) -> str:
    """Write the traceback of a failure nobody expected to a file; returns a line for the user."""
    file = state_folder() / "chat-error.log"
    line = f"{type(error).__name__}: {error}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError:
        return line
    return f"{line} (details in {file})"
