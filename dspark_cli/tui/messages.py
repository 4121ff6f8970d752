"""Everything that happens somewhere else and concerns the window: facts, posted by workers, handled by the app."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from dspark_cli.engine.live import Race
from dspark_cli.engine.rounds import Request, Round
from dspark_cli.engine.stats import Stats
from dspark_cli.tui.commands import Command
from dspark_cli.tui.opening import Opened, Stage


@dataclass
class Loading(Message):
    """Loading came this far."""

    stage: Stage


@dataclass
class Said(Message):
    """Something worth a line: the memory plan, a caution, a file that arrived."""

    text: str


@dataclass
class ModelLoaded(Message):
    """The pair is ready, for the first time or with another drafter or policy."""

    opened: Opened
    switched: bool = False


@dataclass
class LoadFailed(Message):
    """The pair could not be loaded or switched. reason None: the user cancelled it."""

    reason: Exception | None
    switched: bool = False


@dataclass
class PromptRead(Message):
    """`done` of `total` tokens of the prompt are computed."""

    done: int
    total: int


@dataclass
class RoundsDone(Message):
    """Rounds of the answer that is being made, in order."""

    rounds: list[Round]


@dataclass
class AnswerDone(Message):
    """The answer ended. request: None where the prompt could not even be made. failure: why it broke off.

    stopped: the user wanted it
    """

    request: Request | None
    stopped: bool = False
    failure: Exception | None = None


@dataclass
class RaceMoved(Message):
    """The plain runner of a race came this far."""

    plain: Stats


@dataclass
class RaceDone(Message):
    """The race is over. race: None when it was stopped or failed."""

    race: Race | None
    failure: Exception | None = None


@dataclass
class Sent(Message):
    """The user sent the text of the input."""

    text: str


@dataclass
class InputDropped(Message):
    """The terminal sent bytes that are not UTF-8; they and what came with them are lost."""


@dataclass
class Asked(Message):
    """The user gave a command its argument in the dialog."""

    command: Command
    argument: str


@dataclass
class Scrolled(Message):
    """The user wants to see other lines of the conversation; pages: negative is up."""

    pages: float
