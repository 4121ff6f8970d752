"""Asking and answering in the real window over a scripted target: keys in, screen out."""

from __future__ import annotations

import threading

import pytest
from scripted import (
    TEXT,
    Held,
    ScriptedOpener,
    app_of,
    ask,
    draw_every_round,
    drive,
    half_way,
    press,
    prompt_of,
    ready,
    settle,
    shown,
    type_and_send,
    until,
)
from textual.pilot import Pilot

from dspark_cli.backends.errors import DsparkError
from dspark_cli.engine.conversation import Conversation
from dspark_cli.engine.kept import kept_file

LONG = "words and words again, " * 400


def test_an_answer_is_rendered_and_its_figures_shown() -> None:
    app, _ = app_of({"hello": TEXT})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hello")
        screen = shown(pilot)
        assert "▌ hello" in screen
        assert "An apple and a pear." in screen, "Markdown is rendered"
        assert "**" not in screen
        assert " print('plum')" in screen
        assert "• fig" in screen
        stats = app.answer.stats  # type: ignore[union-attr]
        assert stats.accepted > 20
        assert f"{stats.acceptance_rate:.0%} ({stats.accepted} of {stats.verified} checked)" in screen
        assert f"{stats.accepted_length:.2f} tokens a round" in screen
        assert "● speculating" in screen
        assert "■" in screen, "blocks are drawn"
        assert app.talk.messages[-1] == {"role": "assistant", "content": TEXT}

    drive(app, test)


def test_text_streams_before_the_answer_is_complete() -> None:
    app, target = app_of({"go": "first line\n\nsecond line"})
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        await type_and_send(pilot, "go")
        for _ in range(4):
            held.passes.release()
        draw_every_round(app)
        await until(pilot, lambda: "first l" in shown(pilot))
        assert "second line" not in shown(pilot)
        assert "answering" in shown(pilot)
        held.go.set()
        await ready(pilot)
        assert "second line" in shown(pilot)

    drive(app, test)


def test_two_never_decode_at_once() -> None:
    app, target = app_of(lambda question: LONG)
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        await type_and_send(pilot, "go")
        await type_and_send(pilot, "again")
        assert "still answering" in shown(pilot)
        assert prompt_of(app).text == "again", "what was typed is not lost"
        with pytest.raises(DsparkError, match="busy"), app.decoder.alone():
            pass
        await press(pilot, "f4", "f5")
        assert len(app.talk.messages) == 1
        await press(pilot, "escape")
        held.go.set()
        await ready(pilot)

    drive(app, test)


def test_escape_stops_and_keeps_what_came() -> None:
    app, target = app_of(lambda question: LONG)
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        await half_way(pilot, target, held)
        await press(pilot, "escape")
        held.go.set()
        await ready(pilot)
        assert "(stopped)" in shown(pilot)
        text = app.talk.messages[-1]["content"]
        assert 5 < len(text) < len(LONG)
        assert LONG.startswith(text)

    drive(app, test)


def test_a_stop_while_the_prompt_is_read_gives_the_question_back() -> None:
    app, target = app_of(lambda question: "never")
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        prompt_of(app).insert("x" * 1500)
        await press(pilot, "enter")
        await until(pilot, lambda: "reading the prompt: 0 of 15" in shown(pilot))
        await press(pilot, "escape")
        held.passes.release()
        await ready(pilot)
        assert app.talk.messages == []
        assert prompt_of(app).text == "x" * 1500
        held.go.set()

    drive(app, test)


def test_regenerate_edit_and_new() -> None:
    answers = {"first": "one", "second": "three"}
    app, _ = app_of(answers.__getitem__)

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "first")
        assert app.talk.last_answer == "one"
        answers["first"] = "two"
        await press(pilot, "f5")
        await ready(pilot)
        assert [m["content"] for m in app.talk.messages] == ["first", "two"]
        assert "one" not in shown(pilot).partition("│")[0]
        await press(pilot, "f6")
        assert app.talk.messages == []
        assert prompt_of(app).text == "first"
        await press(pilot, *(["backspace"] * 5))
        await ask(pilot, "second")
        assert [m["content"] for m in app.talk.messages] == ["second", "three"]
        await press(pilot, "ctrl+n")
        assert app.talk.messages == []
        assert "three" not in shown(pilot)

    drive(app, test)


def test_a_retry_that_brings_nothing_leaves_the_old_answer() -> None:
    app, target = app_of({"hi": "ho"})

    def fail() -> None:
        raise DsparkError("no room for 3 more tokens")

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        target.before_step = fail
        await press(pilot, "f5")
        await ready(pilot)
        assert [m["content"] for m in app.talk.messages] == ["hi", "ho"]
        assert prompt_of(app).text == ""
        assert "no room" in shown(pilot)

    drive(app, test)


def test_a_race_compares_with_plain_decoding() -> None:
    app, _ = app_of({"hi": "a b c d e f g"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        assert "plain: by measured costs" in shown(pilot)
        await press(pilot, "f4")
        await ready(pilot)
        race = app.watching.race
        assert race is not None
        assert race.identical
        assert race.plain.tokens == race.speculative.tokens
        assert race.plain.verified == 0
        assert f"{race.ratio:.2f}x plain, identical" in shown(pilot)
        assert "Both texts are identical" in shown(pilot)

    drive(app, test)


def test_a_race_reports_the_first_difference() -> None:
    app, target = app_of({"hi": "abcdefgh"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        target.script = lambda question: "abcXefgh"
        await press(pilot, "f4")
        await ready(pilot)
        assert "differs at token 3" in shown(pilot)
        assert app.watching.race.margin == pytest.approx(10.0)  # type: ignore[union-attr]

    drive(app, test)


def test_without_a_profile_plain_speed_is_not_invented() -> None:
    app, _ = app_of({"hi": "ho"}, measured=False)

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        assert "plain: unknown, F4 races" in shown(pilot)

    drive(app, test)


def test_the_model_failing_in_the_middle_keeps_window_and_conversation() -> None:
    app, target = app_of({"hi": "a long answer that breaks", "again": "fine"})

    def fail_late() -> None:
        if target.passes > 4:
            raise DsparkError("libllama failed on a pass of 5 tokens (status -3)", hint="a smaller --ctx")

    async def test(pilot: Pilot[None]) -> None:
        target.before_step = fail_late
        await ask(pilot, "hi")
        screen = " ".join(shown(pilot).split())
        assert "libllama failed on a pass" in screen
        assert "(broke off here)" in screen
        assert "Traceback" not in screen
        assert "a long answer that breaks".startswith(app.talk.last_answer or "?")
        target.before_step = lambda: None
        await ask(pilot, "again")
        assert app.talk.last_answer == "fine"

    drive(app, test)


def test_a_failure_nobody_expected_is_one_line_and_a_file() -> None:
    app, target = app_of({"hi": "ho"})

    def crash() -> None:
        raise RuntimeError("segfault would be worse")

    async def test(pilot: Pilot[None]) -> None:
        target.before_step = crash
        await ask(pilot, "hi")
        screen = " ".join(shown(pilot).split())
        assert "RuntimeError: segfault would be worse" in screen
        assert app.talk.messages == []
        assert prompt_of(app).text == "hi"
        assert "RuntimeError" in (kept_file().parent / "chat-error.log").read_text()

    drive(app, test)


def test_ctrl_c_stops_and_twice_leaves() -> None:
    app, target = app_of(lambda question: LONG)
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        await half_way(pilot, target, held)
        await press(pilot, "ctrl+c")
        held.go.set()
        await ready(pilot)
        assert "Ctrl-C again leaves" in shown(pilot)
        await press(pilot, "ctrl+c")

    drive(app, test)
    assert app.return_code == 130
    kept = Conversation.load(kept_file())
    assert kept.messages[0]["content"] == "go"
    assert LONG.startswith(kept.messages[1]["content"])


def test_leaving_in_the_middle_keeps_the_partial_answer() -> None:
    app, target = app_of(lambda question: LONG)
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        await type_and_send(pilot, "go")
        draw_every_round(app)
        for _ in range(10):
            held.passes.release()
        await until(pilot, lambda: app.answer and len(app.answer.text) > 5)
        await press(pilot, "ctrl+q")
        held.go.set()
        await settle(pilot)

    drive(app, test)
    assert app.return_code == 0
    assert LONG.startswith(Conversation.load(kept_file()).messages[1]["content"])


def test_one_thread_touches_the_engine() -> None:
    """OpenMP keeps a pool of threads for each thread that computes; a second pool halves the speed of a small machine."""
    app, target = app_of({"hi": "ho"})
    threads: set[int] = set()
    target.before_step = lambda: threads.add(threading.get_ident())
    opener = app.opener
    assert isinstance(opener, ScriptedOpener)
    opener.on_open = lambda: threads.add(threading.get_ident())

    async def test(pilot: Pilot[None]) -> None:
        for _ in range(3):
            await ask(pilot, "hi")
            await press(pilot, "f4")
            await ready(pilot)
        await ask(pilot, "/policy fixed:2")
        assert len(threads) == 1
        assert threading.get_ident() not in threads

    drive(app, test)
