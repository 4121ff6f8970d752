"""Makes the pictures of `dspark chat` in this folder: real answers of the embedded model in the real window.

    python docs/screenshots.py

Speeds on them are those of the machine it runs on; nothing is staged but the questions.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from textual.pilot import Pilot

from dspark_cli.cli.opener import PairOpener
from dspark_cli.cli.options import PairOptions
from dspark_cli.engine.talk import Settings
from dspark_cli.tui.app import ChatApp, make_app
from dspark_cli.tui.messages import Sent

FOLDER = Path(__file__).parent
CODE = "Write a Python function that returns the largest number of a list, and explain it."


async def ask(pilot: Pilot[None], text: str) -> None:
    pilot.app.post_message(Sent(text))
    await pilot.pause(0.3)
    await done(pilot)


async def done(pilot: Pilot[None]) -> None:
    while pilot.app.busy:  # type: ignore[attr-defined]
        await pilot.pause(0.05)
    await pilot.pause(0.2)


async def speculating(pilot: Pilot[None]) -> None:
    await ask(pilot, CODE)


async def raced(pilot: Pilot[None]) -> None:
    """Tokens by origin, after a race against plain decoding."""
    await ask(pilot, CODE)
    await pilot.press("f4")
    await done(pilot)
    await pilot.press("f3")
    pilot.app.clear_notifications()
    await pilot.pause(0.3)


async def keys(pilot: Pilot[None]) -> None:
    await pilot.press("f1")
    await pilot.pause(0.3)


PICTURES: dict[str, tuple[tuple[int, int], Callable[[Pilot[None]], Awaitable[None]]]] = {
    "chat": ((124, 46), speculating),
    "chat-race": ((124, 46), raced),
    "chat-narrow": ((80, 24), speculating),
    "chat-keys": ((100, 44), keys),
}


async def picture(size: tuple[int, int], how: Callable[[Pilot[None]], Awaitable[None]], history: Path) -> str:
    options = PairOptions("smollm2-135m", "auto", "auto", "auto", None, None, None, None, "f16", "auto", True)
    app: ChatApp = make_app(PairOpener(options), settings=Settings(max_tokens=220), history=history)
    async with app.run_test(size=size) as pilot:
        await done(pilot)
        await how(pilot)
        svg = app.export_screenshot(title="dspark chat")
    app.free()
    # The picture must not fetch fonts: the reader's own monospace will do.
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def main() -> None:
    with TemporaryDirectory() as folder:
        for name, (size, how) in PICTURES.items():
            svg = asyncio.run(picture(size, how, Path(folder) / "history"))
            (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")
            print(f"docs/{name}.svg", flush=True)


if __name__ == "__main__":
    main()
