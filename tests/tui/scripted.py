"""A target that says what a script says, byte by byte, with the real engine around it; and what a test needs of the window."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from textual.pilot import Pilot

from dspark_cli.backends.base import Draft, Drafter, DraftRequest, Row, RowOutput, Target, TargetInfo
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.schedule import Off, Schedule, parse_policy
from dspark_cli.engine.session import Session
from dspark_cli.registry.plan import Device, MemoryPlan, Need
from dspark_cli.tui.app import ChatApp, make_app
from dspark_cli.tui.messages import Sent
from dspark_cli.tui.opening import Opened, Progress
from dspark_cli.tui.prompt import Prompt
from fakes import FakeTokenizer

EOG = 256
TEXT = "# Fruits\n\nAn **apple** and a `pear`.\n\n```python\nprint('plum')\n```\n\n- fig\n- date\n"
ASSISTANT = "\x01"  # where the answer begins in a rendered prompt


class ByteTokenizer(FakeTokenizer):
    """Token i is byte i; 256 ends a turn."""

    def __init__(self) -> None:
        super().__init__(257, frozenset({EOG}))

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == EOG else bytes([token])


class ScriptedTarget(Target):
    """Answers the last question of the prompt with `script[question]` (a text or a function of the question).

    before_step: called before each pass: to hold it, or to fail in the middle of an answer
    """

    def __init__(self, script: Mapping[str, str] | Callable[[str], str], *, n_ctx: int = 4096) -> None:
        self.script = script if callable(script) else script.__getitem__
        self.info = TargetInfo("scripted", "", "fake", "F16", "cpu", 257, 4, 2, n_ctx, 1)
        self.tokenizer = ByteTokenizer()
        self.max_rows = 512
        self.cache: list[int] = []
        self.before_step: Callable[[], None] = lambda: None
        self.passes = 0
        self.released = threading.Event()

    def render_chat(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        return "".join(f"{m['role']}\x02{m['content']}\n" for m in messages) + "assistant" + ASSISTANT

    def wanted(self) -> bytes:
        """The whole answer to the question in the cache."""
        prompt = bytes(t for t in self.cache if t < EOG).partition(ASSISTANT.encode())[0].decode(errors="replace")
        question = prompt.rpartition("user\x02")[2].removesuffix("\nassistant")
        return self.script(question).encode()

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        self.before_step()
        self.passes += 1
        (row,) = rows
        count = len(row.tokens) if row.n_logits is None else row.n_logits
        logits = np.zeros((count, 257), dtype=np.float32)
        for i, token in enumerate(row.tokens):
            self.cache.append(int(token))
            if (at := i - len(row.tokens) + count) >= 0:
                logits[at, self._next()] = 10.0
        self.native_ms += 1.0
        return [RowOutput(logits, None)]

    def _next(self) -> int:
        begin = len(self.cache) - self.cache[::-1].index(ASSISTANT.encode()[0])
        said, wanted = bytes(t for t in self.cache[begin:] if t < EOG), self.wanted()
        return wanted[len(said)] if wanted.startswith(said) and len(said) < len(wanted) else EOG

    def request_features(self, layers: Sequence[int]) -> None: ...

    def length(self, seq: int) -> int:
        return len(self.cache)

    def rewind(self, seq: int, length: int) -> None:
        del self.cache[length:]

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class ScriptedDrafter(Drafter):
    """Knows the script, and is wrong at every `wrong`-th byte of an answer."""

    kind = name = "lookup"
    has_pass = False
    block_size = 4

    def __init__(self, target: ScriptedTarget, *, wrong: int = 6) -> None:
        self.target, self.wrong = target, wrong

    def quick(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> Draft:
        cache = [*self.target.cache, request.anchor]
        begin = len(cache) - cache[::-1].index(ASSISTANT.encode()[0])
        said = len(cache) - begin
        ahead = self.target.wanted()[said : said + request.block]
        tokens = [ord("#") if (said + i) % self.wrong == self.wrong - 1 else byte for i, byte in enumerate(ahead)]
        return Draft(np.asarray(tokens, dtype=np.int64), np.full(len(tokens), 0.8, dtype=np.float32), None, "lookup")

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        raise AssertionError("it has no pass")

    def observe(self, seq: int, tokens: Sequence[int], features: object) -> None: ...

    def rewind(self, seq: int, length: int) -> None: ...

    def fork(self, source: int, destination: int, length: int | None = None) -> None: ...


class Parked(Off):
    """A schedule that has parked speculation, for the reason `auto` would give."""

    name = "auto"
    parked = "0.87x expected on this machine with Q4_1"  # type: ignore[assignment]


class ScriptedSession(Session):
    """A real session; `switch` needs no files."""

    def switch(self, options: object) -> None:
        raise AssertionError("the opener of these tests switches by itself")

    @property
    def costs(self) -> CostModel:
        return CostModel(Curve({1: 10.0, 8: 20.0}), own_ms=0.0)


PLAN = MemoryPlan(
    device=Device("cpu", "cpu", 8 << 30, 4 << 30),
    backend="llamacpp",
    target=Need(weights=98_000_000, kv=94_000_000, compute=30_000_000),
    drafter=None,
    ctx=4096,
    n_seq=1,
    kv_type="f16",
    gpu_layers=0,
    n_layer=2,
    verify_width=9,
    on_device=0,
    on_host=222_000_000,
    host_free=4 << 30,
)


@dataclass
class ScriptedOpener:
    """Opens a session over `target`. hold: loading waits for it. failure: raised instead of opening or switching."""

    target: ScriptedTarget
    drafter: str = "lookup"
    policy: str = "fixed:4"
    hold: threading.Event | None = None
    failure: Exception | None = None
    measured: bool = True
    schedule: Schedule | None = None
    on_open: Callable[[], None] = lambda: None
    model: str = "scripted"
    switched: list[tuple[str, str | None]] = field(default_factory=list)

    def open(self, progress: Progress) -> Opened:
        self.on_open()
        progress.say("222 MB of 4.3 GB free on cpu")
        progress.stage("loading the model", 0.5)
        while self.hold is not None and not self.hold.wait(0.01):
            progress.stage("loading the model", 0.5)
        if self.failure is not None:
            raise self.failure
        return Opened(self._session(), PLAN)

    def switch(self, opened: Opened, drafter: str, policy: str | None, progress: Progress) -> Opened:
        self.on_open()
        progress.stage("switching")
        if self.failure is not None:
            raise self.failure
        self.switched.append((drafter, policy))
        self.drafter, self.policy = drafter, policy or "fixed:4"
        return Opened(self._session(), PLAN)

    def _session(self) -> Session:
        drafter = None if self.drafter == "none" else ScriptedDrafter(self.target)
        session = ScriptedSession(self.target, drafter, self.schedule or parse_policy(self.policy))
        session.profile = object() if self.measured else None  # type: ignore[assignment]
        return session


def app_of(script: Mapping[str, str] | Callable[[str], str], **options: object) -> tuple[ChatApp, ScriptedTarget]:
    """The real app over a scripted target."""
    target = ScriptedTarget(script)
    return make_app(ScriptedOpener(target, **options)), target  # type: ignore[arg-type]


def screen_text(app: ChatApp) -> str:
    """What stands on the screen, a line a row."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


def shown(pilot: Pilot[None]) -> str:
    return screen_text(pilot.app)  # type: ignore[arg-type]


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


class Held:
    """A target that waits before each pass until it is let go."""

    def __init__(self, target: ScriptedTarget) -> None:
        self.go = target.released
        self.passes = threading.Semaphore(0)
        target.before_step = self._step

    def _step(self) -> None:
        while not self.go.is_set() and not self.passes.acquire(timeout=0.01):
            pass


def prompt_of(app: ChatApp) -> Prompt:
    return app.query_one(Prompt)


def command(app: ChatApp, line: str) -> None:
    """What typing `line` and Enter does."""
    app.post_message(Sent(line))


def draw_every_round(app: ChatApp) -> None:
    app.budget.interval = 0.0
    app.budget.spent = lambda: None  # type: ignore[method-assign]


async def until(pilot: Pilot[None], true: Callable[[], object], what: str = "it") -> None:
    """Wait for something to become true, ten seconds at most."""
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, f"{what} never came:\n{shown(pilot)}"
        await pilot.pause(0.01)


async def settle(pilot: Pilot[None]) -> None:
    """Wait until what was pressed or posted so far has been handled, and drawn.

    Textual's own pause takes a process that used no CPU for 20 ms for an idle one; on a busy machine that is one that was
    not given any, and the key is still on its way. Here a mark goes the way of a key, through every queue: the app's, the
    screen's, that of the widget with the focus (whose messages go back to the app).
    """
    app, end = pilot.app, time.monotonic() + 10
    for _ in range(2):
        for place in (app, app.screen, app.focused, app):
            passed = threading.Event()
            if place is not None and place.is_running:
                place.call_later(passed.set)
            while place is not None and place.is_running and not passed.is_set():  # a screen may close meanwhile
                assert time.monotonic() < end, f"{place} handles no messages:\n{shown(pilot)}"
                await asyncio.sleep(0.002)
    await pilot.pause()


async def ready(pilot: Pilot[None]) -> None:
    """Wait for the model, or for what runs, to be done."""
    await settle(pilot)
    await until(pilot, lambda: not pilot.app.busy, "the end")  # type: ignore[attr-defined]
    await settle(pilot)


async def press(pilot: Pilot[None], *keys: str) -> None:
    """Press keys and wait until they have been handled."""
    await pilot.press(*keys)
    await settle(pilot)


async def ask(pilot: Pilot[None], text: str) -> None:
    """Type a question, send it, wait for the answer."""
    await type_and_send(pilot, text)
    await ready(pilot)


async def half_way(pilot: Pilot[None], target: ScriptedTarget, held: Held) -> None:
    """Ask, and let the answer come for ten passes."""
    await type_and_send(pilot, "go")
    for _ in range(10):
        held.passes.release()
    await until(pilot, lambda: target.passes >= 10)


async def type_and_send(pilot: Pilot[None], text: str) -> None:
    names = {" ": "space", "/": "slash", ":": "colon", ".": "full_stop", "-": "minus", "_": "underscore"}
    await press(pilot, *(names.get(c, c) for c in text), "enter")
