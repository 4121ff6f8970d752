"""The errors every room raises. Imports nothing, so that `dspark --help` stays quick."""

from __future__ import annotations


class DsparkError(Exception):
    """An expected failure: one line that says what failed, and what to type next.

    Attributes:
        hint: a command or a change that would help; None if there is nothing to suggest.
        exit_code: what the process ends with (1 failed, 2 usage, 3 this machine cannot serve it).
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class BadInput(DsparkError):
    """The request itself cannot be served: wrong option, unreadable or unusable input."""

    exit_code = 2


class NotReady(DsparkError):
    """This machine cannot serve the request: weights, memory or a driver is missing."""

    exit_code = 3


class PairMismatch(DsparkError):
    """A drafter does not fit the target it was asked to serve."""


class ContextFull(DsparkError):
    """A sequence does not fit the context it was given."""
