"""Textual's terminal driver, less what makes it end: bytes that are not UTF-8, as a paste from an old file may have them."""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textual.driver import Driver

PAUSE_S = 0.05  # a paste has ended when nothing more comes for this long


def forgiving_driver() -> type[Driver] | None:
    """The driver class to use; None leaves the choice to Textual (Windows has no such bytes)."""
    if sys.platform == "win32":
        return None
    from textual.drivers.linux_driver import LinuxDriver

    from dspark_cli.tui.messages import InputDropped

    class ForgivingDriver(LinuxDriver):
        """Drops input that is not UTF-8, to the end of what was pasted, and says so."""

        def run_input_thread(self) -> None:
            while not self.exit_event.is_set():
                try:
                    super().run_input_thread()
                except UnicodeDecodeError:
                    self._drop_the_rest()
                    self._app.post_message(InputDropped())

        def _drop_the_rest(self) -> None:
            """What follows belongs to it: a line end in there must not send half of a paste."""
            while select.select([self.fileno], [], [], PAUSE_S)[0]:
                if not os.read(self.fileno, 1 << 16):
                    return

    return ForgivingDriver
