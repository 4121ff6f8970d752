"""Where conversations are kept without being asked to, so that a closed terminal loses none."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_state_path

from dspark_cli.backends.errors import DsparkError


def state_folder() -> Path:
    """The folder of history and kept conversations; it may not exist yet."""
    return user_state_path("dspark")


def kept_file() -> Path:
    """The last conversation."""
    return state_folder() / "last-chat.json"


def last_conversation() -> Path:
    """The file of the last conversation. Raises DsparkError when there is none."""
    file = kept_file()
    if not file.exists():
        raise DsparkError("there is no conversation to resume yet", hint="dspark chat")
    return file
