"""The main screens, character by character, at two sizes: text, so that no version of Textual's SVG or CSS matters.

    UPDATE_SCREENS=1 pytest tests/tui/test_screens.py

writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from scripted import Parked, app_of, ask, press, ready, screen_text, settle, until
from textual.pilot import Pilot

from dspark_cli.engine.rounds import Times

FOLDER = Path(__file__).parent / "screens"
SIZES = ((80, 24), (200, 60))
ANSWER = (
    "# Three fruits\n\nHere they are, the **sweetest** first:\n\n1. fig\n2. pear\n3. apple\n\n"
    "```python\ndef sweetest(fruits):\n    return max(fruits, key=sugar)\n```\n\n"
    "A fig is sweet, a pear is sweet, an apple is sweet.\n"
)


async def nothing(pilot: Pilot[None]) -> None:
    """The window as it opens."""


async def answered(pilot: Pilot[None]) -> None:
    await ask(pilot, "three fruits")


async def helped(pilot: Pilot[None]) -> None:
    await press(pilot, "f1")
    await until(pilot, lambda: "Keys and commands" in screen_text(pilot.app))  # type: ignore[arg-type]


async def raced(pilot: Pilot[None]) -> None:
    await ask(pilot, "three fruits")
    await press(pilot, "f4")
    await ready(pilot)
    pilot.app.clear_notifications()
    await settle(pilot)


SCREENS: dict[str, Callable[[Pilot[None]], Awaitable[None]]] = {
    "empty": nothing,
    "answer": answered,
    "parked": answered,
    "help": helped,
    "race": raced,
}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", SCREENS)
def test_screen(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made equal, so that every figure on the screen is the same each run."""
    monkeypatch.setattr(
        "dspark_cli.engine.decode.PassClock.split", lambda self, prompts: (Times(0.5, 20.0, 0.0, 0.5), 20.5)
    )
    app, _ = app_of({"three fruits": ANSWER}, schedule=Parked() if name == "parked" else None)

    async def run() -> str:
        async with app.run_test(size=size) as pilot:
            await ready(pilot)
            await SCREENS[name](pilot)
            await settle(pilot)
            return screen_text(app)

    screen = asyncio.run(run())
    app.free()
    file = FOLDER / f"{name}-{size[0]}x{size[1]}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(screen + "\n", encoding="utf-8")
    assert without_frames(screen) == without_frames(file.read_text(encoding="utf-8").rstrip("\n"))


def without_frames(screen: str) -> str:
    """Text without the shapes of borders and scrollbars, which are Textual's own business."""
    return re.sub(r"[╭╮╰╯│─▁▂▃▄▅▆▇▔▕▏┃━]", " ", screen)
