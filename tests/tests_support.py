"""Small things that several test files need."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_cli.backends.base import FloatArray, IntArray


def own_registry(text: str) -> Path:
    """Write the user's own models.toml of this test (conftest moves the configuration directory)."""
    from dspark_cli.registry.models import user_file

    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text, encoding="utf-8")
    return user_file()


def whole_row(row: FloatArray, ids: IntArray | None, n_vocab: int) -> FloatArray:
    """Logits [V] from those of the tokens `ids`, as a `DraftRequest.choose` is shown them; -inf elsewhere."""
    full = np.full(n_vocab, -np.inf, dtype=np.float32)
    full[np.arange(len(row)) if ids is None else ids] = row
    return full
