"""The real window over a scripted target and the real engine: keys in, screen out."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from scripted import ScriptedOpener, ScriptedTarget, app_of, ask, ready, screen_text, type_and_send, until
from textual import events
from textual.pilot import Pilot

from dspark_cli.backends.errors import DsparkError, NotReady
from dspark_cli.engine.conversation import Conversation
from dspark_cli.engine.kept import kept_file
from dspark_cli.tui.app import ChatApp
from dspark_cli.tui.messages import Sent
from dspark_cli.tui.prompt import Prompt

TEXT = "# Fruits\n\nAn **apple** and a `pear`.\n\n```python\nprint('plum')\n```\n\n- fig\n- date\n"
LONG = "words and words again, " * 400


def drive(
    app: ChatApp,
    test: Callable[[Pilot[None]], Awaitable[None]],
    size: tuple[int, int] = (120, 40),
    *,
    loaded: bool = True,
) -> None:
    """Run `test` with the app in a window of `size`, once the model is loaded."""

    async def run() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            if loaded:
                await ready(pilot)
            try:
                await test(pilot)
            finally:
                app.opener.target.released.set()  # type: ignore[attr-defined]  (or a failed test would wait for ever)
        app.free()

    asyncio.run(run())


def shown(pilot: Pilot[None]) -> str:
    return screen_text(pilot.app)  # type: ignore[arg-type]


def prompt_of(app: ChatApp) -> Prompt:
    return app.query_one(Prompt)


def command(app: ChatApp, line: str) -> None:
    """What typing `line` and Enter does."""
    app.post_message(Sent(line))


def draw_every_round(app: ChatApp) -> None:
    app.budget.interval = 0.0
    app.budget.spent = lambda: None  # type: ignore[method-assign]


class Held:
    """A target that waits before each pass until it is let go."""

    def __init__(self, target: ScriptedTarget) -> None:
        self.go = target.released
        self.passes = threading.Semaphore(0)
        target.before_step = self._step

    def _step(self) -> None:
        while not self.go.is_set() and not self.passes.acquire(timeout=0.01):
            pass


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
        await pilot.press("f4", "f5")
        assert len(app.talk.messages) == 1
        await pilot.press("escape")
        held.go.set()
        await ready(pilot)

    drive(app, test)


def test_escape_stops_and_keeps_what_came() -> None:
    app, target = app_of(lambda question: LONG)
    held = Held(target)

    async def test(pilot: Pilot[None]) -> None:
        await type_and_send(pilot, "go")
        for _ in range(10):
            held.passes.release()
        await until(pilot, lambda: target.passes >= 10)
        await pilot.press("escape")
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
        await pilot.press("enter")
        await until(pilot, lambda: "reading the prompt: 0 of 15" in shown(pilot))
        await pilot.press("escape")
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
        await pilot.press("f5")
        await ready(pilot)
        assert [m["content"] for m in app.talk.messages] == ["first", "two"]
        assert "one" not in shown(pilot).partition("│")[0]
        await pilot.press("f6")
        assert app.talk.messages == []
        assert prompt_of(app).text == "first"
        await pilot.press(*(["backspace"] * 5))
        await ask(pilot, "second")
        assert [m["content"] for m in app.talk.messages] == ["second", "three"]
        await pilot.press("ctrl+n")
        assert app.talk.messages == []
        assert "three" not in shown(pilot)

    drive(app, test)


def test_regenerating_a_sampled_answer_takes_another_seed() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        await ask(pilot, "/temperature 0.7")
        assert "T 0.7" in shown(pilot)
        await pilot.press("f5")
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
            await pilot.pause()
        await pilot.press("ctrl+n")
        command(app, f"/load {tmp_path / 'talk.md'}")
        await pilot.pause()
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
        await pilot.press("ctrl+a", "delete", "1", "full_stop", "5", "enter")
        await until(pilot, lambda: app.settings.sampling.temperature == 1.5)
        await type_and_send(pilot, "/system")
        await pilot.press("escape")
        await pilot.pause()
        assert app.talk.system is None

    drive(app, test)


def test_the_palette_and_the_help_screen() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await pilot.press("f1")
        await until(pilot, lambda: "decode the last answer again without drafting" in shown(pilot))
        await pilot.press("escape")
        await pilot.press("ctrl+p")
        await pilot.press(*"colours")
        await until(pilot, lambda: "colour tokens by where they came from" in shown(pilot))
        await pilot.press("enter")
        await pilot.pause(0.1)
        await pilot.press("enter")
        await until(pilot, lambda: app.coloured)

    drive(app, test)


def test_a_race_compares_with_plain_decoding() -> None:
    app, _ = app_of({"hi": "a b c d e f g"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        assert "plain: by measured costs" in shown(pilot)
        await pilot.press("f4")
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
        await pilot.press("f4")
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


def test_tokens_are_coloured_by_origin() -> None:
    app, _ = app_of({"hi": "abcdefghijklmnop"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        await pilot.press("f3")
        await pilot.pause(0.05)
        kinds = dict.fromkeys(kind for kind, _ in app._transcript.content.turns[-1].runs)
        assert set(kinds) == {"accepted", "corrected", "plain"}
        row = [s for y in range(app._transcript.size.height) for s in app._transcript.content.line(y)]
        assert {"green", "bold yellow"} <= {str(s.style) for s in row if s.style}

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
        await type_and_send(pilot, "go")
        for _ in range(10):
            held.passes.release()
        await until(pilot, lambda: target.passes >= 10)
        await pilot.press("ctrl+c")
        held.go.set()
        await ready(pilot)
        assert "Ctrl-C again leaves" in shown(pilot)
        await pilot.press("ctrl+c")
        await pilot.pause(0.05)

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
        await pilot.press("ctrl+q")
        held.go.set()
        await pilot.pause(0.05)

    drive(app, test)
    assert app.return_code == 0
    assert LONG.startswith(Conversation.load(kept_file()).messages[1]["content"])


def test_sizes_from_tiny_to_large_and_back() -> None:
    app, _ = app_of({"hi": TEXT})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        for size in ((20, 5), (1, 1), (3, 40), (200, 3), (200, 60), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause(0.05)
            assert len(shown(pilot).splitlines()) <= size[1]
        screen = shown(pilot)
        assert "• fig" in screen
        assert "acceptance" in screen

    drive(app, test, size=(80, 24))


def test_a_large_paste_is_one_mark_and_is_sent_whole() -> None:
    pasted = "".join(f"line {i} of a log\n" for i in range(12_000))  # 220 kB
    app, target = app_of(lambda question: "ok")
    target.info = ScriptedTarget({}, n_ctx=1 << 20).info

    async def test(pilot: Pilot[None]) -> None:
        prompt_of(app).post_message(events.Paste(pasted + "\x1b[31m\x07"))
        await until(pilot, lambda: "[pasted #1: 12001 lines" in prompt_of(app).text)
        await pilot.press("space", "w", "h", "y", "enter")
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
        await pilot.press("enter")
        await ready(pilot)
        assert "the context holds 4096" in " ".join(shown(pilot).split())
        assert app.talk.messages == []
        assert len(prompt_of(app).full_text) == 200_000

    drive(app, test)


@pytest.mark.parametrize(
    "answer",
    [
        "```python\nunclosed ** [link]( `x",
        "| a | b\n|--\n| 1 | 2 | 3 |\n\n***__~~",
        "<div onclick='x'>\n<script>alert(1)</script>\n[bold]not markup[/bold] [/]",
        "日本語のテキスト" * 20 + "\n\n" + "👨‍👩‍👧‍👦🏳️‍🌈" * 8,
        "e\u0301\u0302\u0303" * 100 + "\u200b\u200d\ufeff",
        "שלום עולם \u202eevil\u202c مرحبا بالعالم \u2067x\u2069 " * 6,
        "\x1b[2J\x1b]0;title\x07\x00\x9b31m \r\rback\x08space",
        "1. a\n   - b\n      1. c\n" * 40 + "> quote\n>> deeper",
        "#" * 200 + "\n" + "x" * 700,
    ],
)
def test_odd_answers_draw_without_harm(answer: str) -> None:
    app, _ = app_of({"hi": answer})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        await pilot.press("f3")
        await pilot.pause(0.02)
        await pilot.press("f3")
        await pilot.resize_terminal(20, 10)
        await pilot.pause(0.05)
        screen = shown(pilot)
        assert not any(
            (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E for c in screen
        )
        assert app.talk.last_answer == answer, "what is kept is what the model said"

    drive(app, test, size=(80, 24))


def test_history_and_lines() -> None:
    app, _ = app_of(lambda question: "ok")

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "one")
        await pilot.press("t", "w", "o", "ctrl+j", "x", "backslash", "enter", "y", "enter")
        await ready(pilot)
        assert app.talk.messages[2]["content"] == "two\nx\ny"
        await pilot.press("d", "r", "a", "f", "t", "up", "up", "up")
        assert prompt_of(app).text == "two\nx\ny"
        await pilot.press("up", "up", "up")
        assert prompt_of(app).text == "one"
        await pilot.press("down", "down", "down", "down", "down")
        assert prompt_of(app).text == "draft"

    drive(app, test)


def test_loading_shows_how_far_it_is_and_can_be_cancelled() -> None:
    app, _ = app_of({"hi": "ho"}, hold=threading.Event())

    async def test(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "loading the model" in shown(pilot))
        assert "50%" in shown(pilot)
        assert "222 MB of 4.3 GB free" in shown(pilot)
        await pilot.press("escape")
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


def test_scrolling_stops_following_and_the_end_follows_again() -> None:
    app, _ = app_of({"go": "".join(f"line {i}\n\n" for i in range(60)), "on": "more"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "go")
        assert "line 59" in shown(pilot)
        await pilot.press("pageup", "pageup")
        await pilot.pause(0.02)
        top = app._transcript.top
        assert "line 59" not in shown(pilot)
        app._transcript.changed()
        assert app._transcript.top == top
        await ask(pilot, "on")
        assert "more" in shown(pilot), "a new question goes to the end"

    drive(app, test, size=(80, 24))


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app, _ = app_of({"hi": "abcdefghijklmnop"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        await pilot.press("f3")
        await pilot.pause(0.05)
        row = [s for y in range(app._transcript.size.height) for s in app._transcript.content.line(y)]
        assert {"underline", "reverse"} <= {str(s.style) for s in row if s.style}, "origin shows without colour"

    drive(app, test)


def test_another_theme_is_drawn_at_once() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        before = app._transcript.render_line(0), app._panel.query("Section").first().render_line(0)  # type: ignore[attr-defined]
        await type_and_send(pilot, "/theme textual-light")
        await pilot.pause(0.1)
        after = app._transcript.render_line(0), app._panel.query("Section").first().render_line(0)  # type: ignore[attr-defined]
        assert app._look(40).code_theme == "friendly"
        for old, new in zip(before, after, strict=True):
            assert old.text == new.text
            assert [s.style for s in old] != [s.style for s in new]

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


def test_a_retry_that_brings_nothing_leaves_the_old_answer() -> None:
    app, target = app_of({"hi": "ho"})

    def fail() -> None:
        raise DsparkError("no room for 3 more tokens")

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        target.before_step = fail
        await pilot.press("f5")
        await ready(pilot)
        assert [m["content"] for m in app.talk.messages] == ["hi", "ho"]
        assert prompt_of(app).text == ""
        assert "no room" in shown(pilot)

    drive(app, test)


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
            await pilot.press("f4")
            await ready(pilot)
        await ask(pilot, "/policy fixed:2")
        assert len(threads) == 1
        assert threading.get_ident() not in threads

    drive(app, test)
