"""Typing, commands, switching and loading in the real window over a scripted target."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from scripted import (
    TEXT,
    Held,
    ScriptedOpener,
    ScriptedTarget,
    app_of,
    ask,
    command,
    drive,
    press,
    prompt_of,
    ready,
    settle,
    shown,
    type_and_send,
    until,
)
from textual import events
from textual.pilot import Pilot

from dspark_cli.backends.errors import DsparkError, NotReady


def test_regenerating_a_sampled_answer_takes_another_seed() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        await ask(pilot, "/temperature 0.7")
        assert "T 0.7" in shown(pilot)
        await press(pilot, "f5")
        await ready(pilot)
        assert app.settings.sampling.seed == 1

    drive(app, test)


def test_system_prompt_policy_and_drafter_are_switched() -> None:
    app, _ = app_of({"hi": "ho"})
    opener = app.opener
    assert isinstance(opener, ScriptedOpener)

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "/system Be brief.")
        assert app.talk.system == "Be brief."
        assert "system: Be brief." in shown(pilot)
        await ask(pilot, "/policy threshold:0.5")
        await ask(pilot, "/drafter none")
        assert opener.switched == [("lookup", "threshold:0.5"), ("none", "off")]
        assert "drafter none, policy off" in shown(pilot)
        await ask(pilot, "hi")
        assert app.watching.live.stats.verified == 0  # type: ignore[union-attr]
        assert "plain decoding" in shown(pilot)
        assert "No drafter: the target makes every" in shown(pilot)
        await ask(pilot, "/system -")
        assert app.talk.system is None

    drive(app, test)


def test_bad_arguments_change_nothing_and_say_what_is_right() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        for typed, says in (
            ("/temperature warm", "a number from 0"),
            ("/temperature nan", "a number from 0"),
            ("/temperature -1", "a number from 0"),
            ("/policy sometimes", "unknown policy"),
            ("/theme mud", "unknown theme"),
            ("/load nowhere.json", "nowhere.json cannot be read"),
            ("/save x.md", "nothing to save"),
            ("/race", "no answer of this session"),
            ("/retry", "nothing was asked"),
            ("/edit", "nothing was asked"),
            ("/copy", "no answer to copy"),
        ):
            app.clear_notifications()
            command(app, typed)
            await until(pilot, lambda says=says: says in " ".join(shown(pilot).split()), says)
        app.clear_notifications()
        await type_and_send(pilot, "/frobnicate")
        await until(pilot, lambda: "unknown command /frobnicate" in shown(pilot))
        assert prompt_of(app).text == "/frobnicate"
        assert app.settings.sampling.temperature == 0
        assert app.talk.messages == []

    drive(app, test)


def test_a_failed_switch_leaves_everything_as_it_was() -> None:
    app, _ = app_of({"hi": "ho"})
    opener = app.opener
    assert isinstance(opener, ScriptedOpener)

    async def test(pilot: Pilot[None]) -> None:
        opener.failure = DsparkError("that drafter has another vocabulary", hint="--drafter lookup")
        await ask(pilot, "/drafter other.gguf")
        assert "another vocabulary" in shown(pilot)
        opener.failure = None
        await ask(pilot, "hi")
        assert app.talk.last_answer == "ho"

    drive(app, test)


def test_save_and_load(tmp_path: Path) -> None:
    app, _ = app_of({"hi": TEXT})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        for name in ("talk.json", "talk.md"):
            command(app, f"/save {tmp_path / name}")
            await settle(pilot)
        await press(pilot, "ctrl+n")
        command(app, f"/load {tmp_path / 'talk.md'}")
        await settle(pilot)
        assert app.talk.messages == json.loads((tmp_path / "talk.json").read_text())
        assert "• fig" in shown(pilot)
        command(app, f"/save {tmp_path / 'no' / 'such' / 'folder.md'}")
        await until(pilot, lambda: "cannot be written" in shown(pilot))

    drive(app, test)


def test_dialogs_ask_for_what_a_command_takes() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await type_and_send(pilot, "/temperature")
        await until(pilot, lambda: "0 is greedy" in shown(pilot))
        await press(pilot, "ctrl+a", "delete", "1", "full_stop", "5", "enter")
        await until(pilot, lambda: app.settings.sampling.temperature == 1.5)
        await type_and_send(pilot, "/system")
        await press(pilot, "escape")
        assert app.talk.system is None

    drive(app, test)


def test_the_palette_and_the_help_screen() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await press(pilot, "f1")
        await until(pilot, lambda: "decode the last answer again without drafting" in shown(pilot))
        await press(pilot, "escape")
        await press(pilot, "ctrl+p")
        await press(pilot, *"colours")
        await until(pilot, lambda: "colour tokens by where they came from" in shown(pilot))
        await press(pilot, "enter")
        await press(pilot, "enter")
        await until(pilot, lambda: app.coloured)

    drive(app, test)


def test_a_policy_chosen_in_the_middle_of_an_answer_comes_after_it() -> None:
    app, target = app_of(lambda question: "a b c d e f")
    held = Held(target)
    opener = app.opener
    assert isinstance(opener, ScriptedOpener)

    async def test(pilot: Pilot[None]) -> None:
        await type_and_send(pilot, "go")
        held.passes.release()
        await type_and_send(pilot, "/policy off")
        await type_and_send(pilot, "/new")
        assert prompt_of(app).text == "/new", "refused, and not lost"
        await type_and_send(pilot, "x")  # "/newx" is no command: nothing happens to the answer
        assert opener.switched == []
        held.go.set()
        await until(pilot, lambda: opener.switched == [("lookup", "off")])
        await ready(pilot)
        assert app.talk.last_answer == "a b c d e f"
        assert "policy off" in shown(pilot)

    drive(app, test)


def test_history_and_lines() -> None:
    app, _ = app_of(lambda question: "ok")

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "one")
        await press(pilot, "t", "w", "o", "ctrl+j", "x", "backslash", "enter", "y", "enter")
        await ready(pilot)
        assert app.talk.messages[2]["content"] == "two\nx\ny"
        await press(pilot, "d", "r", "a", "f", "t", "up", "up", "up")
        assert prompt_of(app).text == "two\nx\ny"
        await press(pilot, "up", "up", "up")
        assert prompt_of(app).text == "one"
        await press(pilot, "down", "down", "down", "down", "down")
        assert prompt_of(app).text == "draft"

    drive(app, test)


def test_a_large_paste_is_one_mark_and_is_sent_whole() -> None:
    pasted = "".join(f"line {i} of a log\n" for i in range(12_000))  # 220 kB
    app, target = app_of(lambda question: "ok")
    target.info = ScriptedTarget({}, n_ctx=1 << 20).info

    async def test(pilot: Pilot[None]) -> None:
        prompt_of(app).post_message(events.Paste(pasted + "\x1b[31m\x07"))
        await until(pilot, lambda: "[pasted #1: 12001 lines" in prompt_of(app).text)
        await press(pilot, "space", "w", "h", "y", "enter")
        await ready(pilot)
        question = app.talk.messages[0]["content"]
        assert question == pasted + "␛[31m␇ why"
        assert app.talk.last_answer == "ok"
        assert "more characters" in shown(pilot)

    drive(app, test)


def test_a_paste_that_the_context_cannot_hold_is_given_back() -> None:
    app, _ = app_of(lambda question: "ok")

    async def test(pilot: Pilot[None]) -> None:
        prompt_of(app).post_message(events.Paste("word " * 40_000))
        await until(pilot, lambda: "pasted" in prompt_of(app).text)
        await press(pilot, "enter")
        await ready(pilot)
        assert "the context holds 4096" in " ".join(shown(pilot).split())
        assert app.talk.messages == []
        assert len(prompt_of(app).full_text) == 200_000

    drive(app, test)


def test_loading_shows_how_far_it_is_and_can_be_cancelled() -> None:
    app, _ = app_of({"hi": "ho"}, hold=threading.Event())

    async def test(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "loading the model" in shown(pilot))
        assert "50%" in shown(pilot)
        assert "222 MB of 4.3 GB free" in shown(pilot)
        await press(pilot, "escape")
        await until(pilot, lambda: app.return_code is not None)

    drive(app, test, loaded=False)
    assert app.return_code == 130
    assert app.problem is None


def test_a_model_that_cannot_be_loaded_ends_the_window_with_its_reason() -> None:
    problem = NotReady("needs 9 GB, 6 GB are free", hint="--ctx 1024")
    app, _ = app_of({}, failure=problem)

    async def test(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.return_code is not None)

    drive(app, test, loaded=False)
    assert app.problem is problem
    assert app.return_code == 1
