"""Small things that several test files need."""

from __future__ import annotations

from pathlib import Path


def own_registry(text: str) -> Path:
    """Write the user's own models.toml of this test (conftest moves the configuration directory)."""
    from dspark_cli.registry.models import user_file

    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text, encoding="utf-8")
    return user_file()
