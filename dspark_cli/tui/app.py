"""The app of `dspark chat`: what each command of the window does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from textual.app import SystemCommand
from textual.screen import Screen

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.engine.conversation import Conversation
from dspark_cli.engine.kept import state_folder
from dspark_cli.engine.schedule import parse_policy
from dspark_cli.engine.talk import Settings
from dspark_cli.tui.ask import Ask
from dspark_cli.tui.commands import BY_NAME, COMMANDS, Command, parse
from dspark_cli.tui.display import Turn
from dspark_cli.tui.help import Help
from dspark_cli.tui.history import History
from dspark_cli.tui.loading import LoadingScreen
from dspark_cli.tui.messages import Asked, Scrolled, Sent
from dspark_cli.tui.opening import Opener
from dspark_cli.tui.working import Working

#: commands that may run while the model works
AFTERWARDS = ("policy", "drafter")  # ... and these wait for the end of the answer
ANY_TIME = ("help", "panel", "colours", "theme", "stop", "copy", "save", "temperature", "system", "quit")


def make_app(
    opener: Opener, talk: Conversation | None = None, settings: Settings | None = None, *, history: Path | None = None
) -> ChatApp:
    """The app, not running yet. Shared by the command and the tests."""
    file = history or state_folder() / "chat_history.jsonl"
    return ChatApp(opener, talk or Conversation(), settings or Settings(), History(file))


class ChatApp(Working):
    """The window with its commands: each is a method `do_NAME`."""

    # -- from the user -------------------------------------------------------------------------------------------------

    def on_sent(self, message: Sent) -> None:
        try:
            found = parse(message.text)
        except BadInput as error:
            self.fail("no such command", error)
            return
        if found is not None:
            if self.run_command(*found):
                self._prompt.sent()
        elif self.busy:
            self.tell(f"still {self.busy}: Esc stops it, then Enter sends this", severity="warning")
        else:
            self._prompt.sent()
            self.talk.ask(message.text)
            self._transcript.content.turns.append(Turn("user", message.text))
            self.keep()
            self.begin()

    def action_command(self, name: str) -> None:
        self.run_command(BY_NAME[name], "")

    def on_asked(self, message: Asked) -> None:
        if message.argument.strip():
            self.run_command(message.command, message.argument.strip())

    def run_command(self, command: Command, argument: str) -> bool:
        """Do it, ask for its argument, or say why it must wait. Returns whether it was taken."""
        if command.asks and not argument:
            self.push_screen(Ask(command, self.present(command)))
        elif self.busy == "answering" and command.name in AFTERWARDS:
            self.afterwards.append(lambda: self.run_command(command, argument))
            self.tell(f"{command.name} {argument}: after this answer")
        elif self.busy and command.name not in ANY_TIME:
            self.tell(f"still {self.busy}: Esc stops it", severity="warning")
            return False
        else:
            try:
                getattr(self, f"do_{command.name}")(argument)
            except DsparkError as error:
                self.fail(f"/{command.name}", error)
        return True

    def present(self, command: Command) -> str:
        """What a dialog starts with: the value as it is now."""
        return {
            "save": f"chat-{datetime.now():%Y-%m-%d-%H%M}.md",
            "system": self.talk.system or "",
            "temperature": f"{self.settings.sampling.temperature:g}",
            "policy": self.watching.policy,
            "drafter": self.watching.drafter or "none",
        }.get(command.name, "")

    def on_scrolled(self, message: Scrolled) -> None:
        self._transcript.scroll_pages(message.pages)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: the same table, and common values of what takes one."""
        for command in COMMANDS:
            yield SystemCommand(command.name.capitalize(), command.help, self._doing(command, ""))
        for name, values in (("policy", ("auto", "off", "fixed:2", "fixed:4")), ("drafter", ("lookup", "none"))):
            for value in values:
                yield SystemCommand(
                    f"{name.capitalize()} {value}", f"/{name} {value}", self._doing(BY_NAME[name], value)
                )

    def _doing(self, command: Command, argument: str) -> Callable[[], object]:
        return lambda: self.run_command(command, argument)

    # -- the commands --------------------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        self.push_screen(Help())

    def do_panel(self, _: str) -> None:
        wanted, usual = not self._panel.display, self.screen.has_class("-wide")
        self.screen.set_class(wanted and not usual, "-show-panel")
        self.screen.set_class(usual and not wanted, "-hide-panel")

    def do_colours(self, _: str) -> None:
        self.coloured = not self.coloured
        self._transcript.changed()
        if self.coloured:
            self.tell(
                "green: guessed and kept; yellow: corrected; plain: the target's own. Loaded answers have no colours."
            )

    def do_race(self, _: str) -> None:
        if self.answer is None or self.request is None or not self.answer.tokens:
            raise BadInput("there is no answer of this session to race against", hint="ask something first")
        self.begin_race()

    def do_retry(self, _: str) -> None:
        before = list(self.talk.messages)
        if not self.talk.drop_answer():
            raise BadInput("nothing was asked yet")
        sampling = self.settings.sampling
        if sampling.greedy:
            self.tell("greedy decoding gives the same answer again; /temperature 0.8 varies it")
        else:
            self.settings.sampling = replace(sampling, seed=sampling.seed + 1)
        self.rebuild()
        self.begin(instead_of=before)

    def do_edit(self, _: str) -> None:
        text = self.talk.take_back()
        if text is None:
            raise BadInput("nothing was asked yet")
        self.rebuild()
        self._prompt.put(text)

    def do_copy(self, _: str) -> None:
        text = self.talk.last_answer
        if text is None:
            raise BadInput("there is no answer to copy yet")
        self.copy_to_clipboard(text)
        self.tell(f"{len(text)} characters copied, if this terminal lets programs copy (OSC 52)")

    def do_theme(self, name: str) -> None:
        names = sorted(self.available_themes)
        if name and name not in names:
            raise BadInput(f"unknown theme {name!r}", hint=", ".join(names))
        self.theme = name or names[(names.index(self.theme) + 1) % len(names)]
        self._transcript.changed()
        self.tell(f"theme {self.theme}")

    def do_stop(self, _: str) -> None:
        self.stop()

    def do_new(self, _: str) -> None:
        self.talk.reset()
        self.answer = self.request = None
        self.watching.live = self.watching.race = None
        self.rebuild()
        self.show_figures()

    def do_save(self, name: str) -> None:
        if not self.talk.messages:
            raise BadInput("there is nothing to save yet")
        self.talk.save(Path(name))
        self.tell(f"saved {len(self.talk.messages)} messages to {name}")

    def do_load(self, name: str) -> None:
        self.talk = Conversation.load(Path(name))
        self.answer = self.request = None
        self.watching.live = self.watching.race = None
        self.rebuild()
        self.show_figures()
        self.tell(f"loaded {len(self.talk.messages)} messages; F5 answers the last question again")

    def do_system(self, text: str) -> None:
        self.talk.system = None if text == "-" else text
        self.rebuild()

    def do_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise BadInput(f"a temperature is a number from 0 up, not {text!r}", hint="/temperature 0.8")
        self.settings.sampling = replace(self.settings.sampling, temperature=value)
        self.show_head()

    def do_policy(self, text: str) -> None:
        parse_policy(text)
        drafter = "none" if self.watching.drafter is None and text == "off" else self.opener.drafter
        self._switch("lookup" if drafter == "none" and text != "off" else drafter, text)

    def do_drafter(self, name: str) -> None:
        policy = None if self.watching.policy == "off" else self.watching.policy
        self._switch(name, "off" if name == "none" else policy)

    def _switch(self, drafter: str, policy: str | None) -> None:
        self.busy = "switching"
        self.push_screen(LoadingScreen(f"drafter {drafter}, policy {policy or 'auto'}"))
        self.switch(drafter, policy)

    def do_quit(self, _: str) -> None:
        self.leave()
