"""What the real window draws: colours, sizes, scrolling, strange text."""

from __future__ import annotations

import pytest
from scripted import (
    TEXT,
    app_of,
    ask,
    drive,
    press,
    settle,
    shown,
    type_and_send,
)
from textual.pilot import Pilot


def test_tokens_are_coloured_by_origin() -> None:
    app, _ = app_of({"hi": "abcdefghijklmnop"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        await press(pilot, "f3")
        kinds = dict.fromkeys(kind for kind, _ in app._transcript.content.turns[-1].runs)
        assert set(kinds) == {"accepted", "corrected", "plain"}
        row = [s for y in range(app._transcript.size.height) for s in app._transcript.content.line(y)]
        assert {"green", "bold yellow"} <= {str(s.style) for s in row if s.style}

    drive(app, test)


def test_sizes_from_tiny_to_large_and_back() -> None:
    app, _ = app_of({"hi": TEXT})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        for size in ((20, 5), (1, 1), (3, 40), (200, 3), (200, 60), (80, 24)):
            await pilot.resize_terminal(*size)
            await settle(pilot)
            assert len(shown(pilot).splitlines()) <= size[1]
        screen = shown(pilot)
        assert "• fig" in screen
        assert "acceptance" in screen

    drive(app, test, size=(80, 24))


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
        await press(pilot, "f3")
        await press(pilot, "f3")
        await pilot.resize_terminal(20, 10)
        await settle(pilot)
        screen = shown(pilot)
        assert not any(
            (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E for c in screen
        )
        assert app.talk.last_answer == answer, "what is kept is what the model said"

    drive(app, test, size=(80, 24))


def test_scrolling_stops_following_and_the_end_follows_again() -> None:
    app, _ = app_of({"go": "".join(f"line {i}\n\n" for i in range(60)), "on": "more"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "go")
        assert "line 59" in shown(pilot)
        await press(pilot, "pageup", "pageup")
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
        await press(pilot, "f3")
        row = [s for y in range(app._transcript.size.height) for s in app._transcript.content.line(y)]
        assert {"underline", "reverse"} <= {str(s.style) for s in row if s.style}, "origin shows without colour"

    drive(app, test)


def test_another_theme_is_drawn_at_once() -> None:
    app, _ = app_of({"hi": "ho"})

    async def test(pilot: Pilot[None]) -> None:
        await ask(pilot, "hi")
        before = app._transcript.render_line(0), app._panel.query("Section").first().render_line(0)  # type: ignore[attr-defined]
        await type_and_send(pilot, "/theme textual-light")
        await settle(pilot)
        after = app._transcript.render_line(0), app._panel.query("Section").first().render_line(0)  # type: ignore[attr-defined]
        assert app._look(40).code_theme == "friendly"
        for old, new in zip(before, after, strict=True):
            assert old.text == new.text
            assert [s.style for s in old] != [s.style for s in new]

    drive(app, test)
