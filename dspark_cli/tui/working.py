"""The work behind the window: loading, answering, racing, each in a worker that reports by messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from textual import work
from textual.worker import get_current_worker

from dspark_cli.backends.errors import DsparkError
from dspark_cli.engine.answer import Answer
from dspark_cli.engine.conversation import Conversation, Message
from dspark_cli.engine.rounds import Request
from dspark_cli.engine.session import NEAR_TIE
from dspark_cli.engine.spans import Spans
from dspark_cli.engine.talk import Settings
from dspark_cli.engine.watch import Watch
from dspark_cli.tui import messages as m
from dspark_cli.tui import words
from dspark_cli.tui.display import Turn
from dspark_cli.tui.loading import LoadingScreen
from dspark_cli.tui.opening import Cancelled, Opened, Progress, Stage
from dspark_cli.tui.window import Window


class Working(Window):
    """The window with its workers. They touch the engine through `decoder` alone, and the window by messages alone."""

    def on_mount(self) -> None:
        """Textual calls `Window.on_mount` too, after this one: the first work waits for it."""
        self.push_screen(LoadingScreen(f"dspark chat {self.opener.model}"))
        self.call_next(self._load)

    # -- loading -----------------------------------------------------------------------------------------------------

    @work(thread=True, group="engine")
    def _load(self) -> None:
        self._open(lambda progress: self.opener.open(progress), switched=False)

    @work(thread=True, group="engine")
    def switch(self, drafter: str, policy: str | None) -> None:
        """Another drafter or policy, in the worker: it may measure for some seconds."""
        opened = self._opened
        assert opened is not None
        self._open(lambda progress: self.opener.switch(opened, drafter, policy, progress), switched=True)

    def _open(self, how: Callable[[Progress], Opened], *, switched: bool) -> None:
        worker = get_current_worker()
        try:
            with self.decoder.alone():
                # Kept at once: if the window closes meanwhile, `free` must know of it.
                self._opened = how(Progress(self._told, lambda: worker.is_cancelled))
        except Cancelled:
            self.post_message(m.LoadFailed(None, switched))
        except Exception as error:
            self.post_message(m.LoadFailed(error, switched))
        else:
            self.post_message(m.ModelLoaded(self._opened, switched))

    def _told(self, what: Stage | str) -> None:
        self.post_message(m.Loading(what) if isinstance(what, Stage) else m.Said(what))

    def on_loading(self, message: m.Loading) -> None:
        if isinstance(self.screen, LoadingScreen):
            self.screen.stage(message.stage)

    def on_said(self, message: m.Said) -> None:
        if isinstance(self.screen, LoadingScreen):
            self.screen.say(message.text)
        self.say(message.text)

    def on_model_loaded(self, message: m.ModelLoaded) -> None:
        self._loading_ended()
        self.watching.opened = message.opened
        drafter = message.opened.session.drafter
        self._watch = Watch(drafter.kind if drafter else None)
        self.show_figures()
        if message.switched:
            self.tell(f"drafter {self.watching.drafter or 'none'}, policy {self.watching.policy}")
        while self.afterwards and not self.busy:
            self.afterwards.pop(0)()

    def on_load_failed(self, message: m.LoadFailed) -> None:
        self._loading_ended()
        if message.switched:
            self.fail("nothing was changed", message.reason or DsparkError("cancelled"))
        else:
            self.problem = message.reason
            self.exit(return_code=1 if message.reason else 130)

    def _loading_ended(self) -> None:
        self.busy = ""
        if isinstance(self.screen, LoadingScreen):
            self.pop_screen()
        self._prompt.focus()

    # -- an answer ---------------------------------------------------------------------------------------------------

    def begin(self, instead_of: list[Message] | None = None) -> None:
        """Answer the last question of the conversation. instead_of: the messages as they were, if no answer comes."""
        assert self._opened is not None
        self.busy = "answering"
        self._instead_of = instead_of
        self.answer, self._turn = Answer(), Turn("assistant")
        self._spans = Spans(self._opened.session.target.tokenizer)
        self.watching.answer_begins()
        self._transcript.content.turns.append(self._turn)
        self._transcript.changed(follow=True)
        self._prompt.cursor_blink = False  # each blink would be drawn
        self.budget.start()
        self.show_figures()
        talk = Conversation(self.talk.system, list(self.talk.messages))
        self._engine_worker = self._answering(talk, replace(self.settings))

    @work(thread=True, group="engine")
    def _answering(self, talk: Conversation, settings: Settings) -> None:
        worker, opened = get_current_worker(), self._opened
        assert opened is not None
        request: Request | None = None
        try:
            request = settings.request(opened.session, talk)
            stopped = self.decoder.answer(
                opened.session,
                request,
                tell=lambda rounds: self.post_message(m.RoundsDone(rounds)),
                prefill=lambda done, total: self.post_message(m.PromptRead(done, total)),
                cancelled=lambda: worker.is_cancelled,
            )
            self.post_message(m.AnswerDone(request, stopped))
        except Exception as error:  # the window lives on: the conversation is worth more than a traceback
            self.post_message(m.AnswerDone(request, failure=error))

    def on_prompt_read(self, message: m.PromptRead) -> None:
        self.show_head(f"reading the prompt: {message.done} of {message.total} tokens")

    def on_rounds_done(self, message: m.RoundsDone) -> None:
        self.budget.spent()
        if self.answer is None or self._turn is None or self._spans is None:
            return
        for item in message.rounds:
            self.answer.add(item)
            self._spans.add(item)
            warning = self._watch.add(item)
            if warning:
                self.tell(warning, severity="warning")
        self.watching.add(message.rounds)
        self._turn.text, self._turn.runs = self.answer.text, list(self._spans.runs)
        self._transcript.grown()
        self.show_figures()

    def on_answer_done(self, message: m.AnswerDone) -> None:
        answer, turn = self.answer, self._turn
        assert answer is not None
        assert turn is not None
        self.busy, self.request = "", message.request
        self._prompt.cursor_blink = True
        if message.failure is not None:
            self.fail("the answer broke off" if answer.tokens else "no answer", message.failure)
        if answer.tokens:
            turn.ended = _why_ended(answer, message)
            self.talk.answered(answer.text)
        else:
            self._give_back()
        self.keep()
        self._transcript.changed()
        self.show_figures()
        while self.afterwards and not self.busy:
            self.afterwards.pop(0)()

    def _give_back(self) -> None:
        """Nothing came: the question goes back into the input, or the answer it had stays."""
        if self._instead_of is not None:
            self.talk.messages, text = self._instead_of, None
        else:
            text = self.talk.take_back()
        self.rebuild()
        if text and not self._prompt.text.strip():
            self._prompt.put(text)

    # -- a race ------------------------------------------------------------------------------------------------------

    def begin_race(self) -> None:
        """Decode the last answer plainly."""
        self.busy = "racing"
        self.budget.start()
        self.show_figures()
        self._engine_worker = self._racing()

    @work(thread=True, group="engine")
    def _racing(self) -> None:
        worker, opened, answer, request = get_current_worker(), self._opened, self.answer, self.request
        assert opened is not None
        assert answer is not None
        assert request is not None
        try:
            race = self.decoder.race(
                opened.session,
                request,
                answer.tokens,
                answer.stats,
                moved=lambda plain: self.post_message(m.RaceMoved(plain)),
                cancelled=lambda: worker.is_cancelled,
            )
            self.post_message(m.RaceDone(race))
        except Exception as error:
            self.post_message(m.RaceDone(None, error))

    def on_race_moved(self, message: m.RaceMoved) -> None:
        self.budget.spent()
        self.watching.runner = message.plain
        self.show_figures()

    def on_race_done(self, message: m.RaceDone) -> None:
        self.busy, self.watching.runner, self.watching.race = "", None, message.race
        self.show_figures()
        if message.failure is not None:
            self.fail("the race broke off", message.failure)
        elif message.race is not None and self.request is not None:
            sampling = self.request.sampling
            comparable = sampling.greedy or sampling.accept == "exact"
            verdict = words.race_verdict(message.race, NEAR_TIE, comparable=comparable)
            self.tell(f"{words.race_result(message.race)}. {verdict}")


def _why_ended(answer: Answer, message: m.AnswerDone) -> str:
    if message.failure is not None:
        return "broke off here"
    if message.stopped:
        return "stopped"
    return {"length": "the token limit ended it: --max-tokens", "context": "the context is full: /new, or --ctx"}.get(
        answer.finish or "", "" if answer.text.strip() else "an empty answer"
    )
