"""A program under a pseudo-terminal, and what stands on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable

import pyte


class Terminal:
    """Runs `command` on a terminal of `columns` x `lines`; a thread reads what it draws."""

    def __init__(
        self,
        command: list[str],
        *,
        columns: int = 100,
        lines: int = 30,
        env: dict[str, str] | None = None,
        controlling: bool = True,
    ) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.raw = b""
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.settings = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # closing a controlling terminal hangs the program up
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if controlling else None,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
        )
        self._slave = slave  # kept open, to look at the settings when the program is gone
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            with self._lock:
                self.raw += data
                # pyte prints the end of sequences with private marks that it does not know
                self._stream.feed(data.replace(b"\x1b[>25u", b"").replace(b"\x1b[<u", b""))

    def send(self, keys: str) -> None:
        data = keys.encode()
        while data:
            data = data[os.write(self.master, data[:4096]) :]

    def paste(self, text: str) -> None:
        self.send(f"\x1b[200~{text}\x1b[201~")

    def resize(self, columns: int, lines: int) -> None:
        with self._lock:
            self._screen.resize(lines, columns)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def text(self) -> str:
        with self._lock:
            return "\n".join(line.rstrip() for line in self._screen.display)

    def wait(self, true: Callable[[str], object], seconds: float = 60, what: str = "it") -> str:
        """The screen once `true` of it."""
        end = time.monotonic() + seconds
        while not true(screen := self.text()):
            assert self.process.poll() is None, f"the program ended:\n{screen}\n{self.raw[-2000:]!r}"
            assert time.monotonic() < end, f"{what} never came:\n{screen}"
            time.sleep(0.05)
        return screen

    def end(self, seconds: float = 30) -> int:
        """The exit code, once the program has ended."""
        return self.process.wait(seconds)

    def restored(self) -> bool:
        """Whether the terminal is as it was: settings, the usual screen, a cursor."""
        time.sleep(0.1)
        left, entered = self.raw.rfind(b"\x1b[?1049l"), self.raw.rfind(b"\x1b[?1049h")
        visible = self.raw.rfind(b"\x1b[?25h") > self.raw.rfind(b"\x1b[?25l")
        return termios.tcgetattr(self._slave) == self.settings and left > entered and visible

    def hang_up(self) -> None:
        """Close the terminal, as a window manager or a lost connection does."""
        os.close(self._slave)
        os.close(self.master)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self._slave, self.master):
            with contextlib.suppress(OSError):
                os.close(descriptor)
