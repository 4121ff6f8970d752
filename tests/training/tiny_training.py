"""`dspark train` on the tiny target, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_cli.cli import app

ARGUMENTS = [
    *("--tokens", "12000"),
    *("--anchors", "30000"),
    *("--block", "3"),
    *("--rank", "8"),
    *("--vocab", "512"),
    *("--through", "torch"),
]


def train(target: Path, work: Path, *more: str) -> object:
    arguments = ["train", str(target), "--work", str(work), *ARGUMENTS, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dspark", *arguments])  # what a shell would have given: the recipe quotes it
        return CliRunner().invoke(app, arguments)
