"""What the terminal UI costs, and how soon a key shows while a model decodes.

    python -m dspark_cli.bench.ui

Speed: the same request, in turn, through the loop of `generate` (text to the terminal as it comes) and through the real
window of `dspark chat` on a pseudo-terminal; tok/s from the first to the last round by the wall clock, so that everything
between rounds counts. The ids must be equal. Keys: a letter is typed while the window decodes; the time until it is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

PROMPT = "Write a short story about a lost dog."
KEYS = "ЖЩЮЯФЦЧШЪЫЭ"  # letters that no answer has


@dataclass
class Timed:
    """A session whose rounds are timed by the wall clock, whoever reads them."""

    session: Any
    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, request: Any, **how: Any) -> Iterator[Any]:
        rounds = self.session.run(request, **how)
        ids: list[int] = []
        began = last = 0.0
        try:
            for item in rounds:
                last = time.perf_counter()
                began = began or last
                ids += item.tokens
                yield item
        finally:
            rounds.close()
            self.seconds.append(last - began)
            self.tokens.append(ids)

    @property
    def tok_s(self) -> float:
        return (len(self.tokens[-1]) - 1) / self.seconds[-1]


# -- the process under the terminal --------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Both arms in turn, in one process with one loaded model; writes the figures to `options.out`."""
    from dspark_cli.engine.session import OpenOptions, Session
    from dspark_cli.registry import resolve

    opening = OpenOptions(
        resolve(options.model).path, options.model, drafter=options.drafter, policy=options.policy, ctx=2048
    )
    rows: list[dict[str, Any]] = []
    engine = EngineThread(1)
    session = engine.submit(Session.open, opening).result()
    for repeat in range(options.repeats + 1):
        arms = {
            "generate": lambda: engine.submit(by_generate, Timed(session), options).result(),
            "window": lambda: by_window(Timed(session), options, engine),
        }
        order = list(arms) if repeat % 2 else list(reversed(arms))
        row = {name: arms[name]() for name in order}
        if repeat:  # the first is a warm-up
            rows.append(row)
    session.close()
    Path(options.out).write_text(json.dumps(rows))
    os._exit(0)  # the engine's thread never ends by itself


class EngineThread(ThreadPoolExecutor):
    """One thread for both arms, as either program has one; it outlives the windows, which shut it down when they close."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.submit(int).result()  # what runs in it has ended


def settings_of(options: argparse.Namespace) -> Any:
    from dspark_cli.engine.talk import Settings

    return Settings(max_tokens=options.tokens)


def by_generate(timed: Timed, options: argparse.Namespace) -> dict[str, Any]:
    from dspark_cli.cli.answer import stream
    from dspark_cli.engine.answer import Answer
    from dspark_cli.engine.conversation import Conversation

    talk = Conversation()
    talk.ask(options.prompt)
    stream(timed.run(settings_of(options).request(timed.session, talk)), Answer())
    return {"tok_s": timed.tok_s, "ids": timed.tokens[-1]}


def by_window(timed: Timed, options: argparse.Namespace, engine: EngineThread) -> dict[str, Any]:
    """The real app; it asks by itself and leaves when the answer is there."""
    from dspark_cli.engine.conversation import Conversation
    from dspark_cli.tui.app import ChatApp
    from dspark_cli.tui.history import History
    from dspark_cli.tui.messages import AnswerDone, ModelLoaded, Sent
    from dspark_cli.tui.opening import Opened

    class Opener:
        model, drafter = options.model, options.drafter

        def open(self, progress: Any) -> Opened:
            return Opened(timed)  # type: ignore[arg-type]

        def switch(self, *_: Any) -> Opened:
            raise NotImplementedError("nothing is switched here")

    cpu: list[float] = []

    class Asking(ChatApp):
        """Textual calls the handlers of the base class too."""

        def on_model_loaded(self, message: ModelLoaded) -> None:
            cpu.append(time.thread_time())
            self.post_message(Sent(options.prompt))

        def on_answer_done(self, message: AnswerDone) -> None:
            cpu.append(time.thread_time())
            self.exit()

    Asking(Opener(), Conversation(), settings_of(options), History(), engine).run()
    share = (cpu[1] - cpu[0]) / timed.seconds[-1]
    return {"tok_s": timed.tok_s, "ids": timed.tokens[-1], "ui_cpu_share": share}


# -- the terminal --------------------------------------------------------------------------------------------------------


def on_terminal(command: list[str], columns: int, lines: int, keys: int = 0) -> list[float]:
    """Run `command` on a pseudo-terminal and read what it draws; types `keys` letters and returns how long each took, s."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    with TemporaryDirectory() as state:  # not the user's last conversation
        process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": state},
        )
        os.close(slave)
        try:
            return _echoes(process, master, keys) if keys else _drain(process, master)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            os.close(master)


def _read(master: int, seconds: float) -> bytes | None:
    """What the program draws within `seconds`; None when it has closed its terminal."""
    if not select.select([master], [], [], seconds)[0]:
        return b""
    try:
        return os.read(master, 1 << 16) or None
    except OSError:
        return None


def _drain(process: subprocess.Popen[bytes], master: int) -> list[float]:
    said = b""
    while (data := _read(master, 1.0)) is not None and (data or process.poll() is None):
        said = (said + data)[-4000:]
    if process.wait() != 0:
        sys.exit(f"the measured process failed:\n{said.decode(errors='replace')}")
    return []


def _echoes(process: subprocess.Popen[bytes], master: int, keys: int) -> list[float]:
    """Ask for a long answer, and type while it comes."""
    _until(process, master, b"waiting for a question", 120)
    time.sleep(1)
    os.write(master, b"Tell me a long story.\r")
    _until(process, master, b"answering", 60)
    time.sleep(2)
    waits = []
    for _ in range(keys):
        pause = time.monotonic() + random.uniform(0.1, 0.4)
        while (left := pause - time.monotonic()) > 0:
            _read(master, left)
        key = random.choice(KEYS).encode()
        began = time.perf_counter()
        os.write(master, key)
        _until(process, master, key, 10)
        waits.append(time.perf_counter() - began)
        os.write(master, b"\x7f")
    return waits


def _until(process: subprocess.Popen[bytes], master: int, what: bytes, seconds: float) -> None:
    end, said = time.monotonic() + seconds, b""
    while what not in said:
        data = _read(master, 0.5)
        if data is None or time.monotonic() > end:
            sys.exit(f"{what!r} was never drawn: {said[-2000:]!r}")
        said = (said + data)[-20_000:]


# -- the report ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--drafter", default="lookup")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=200, help="tokens per answer (default 200)")
    parser.add_argument("--repeats", type=int, default=8, help="pairs of runs (default 8; 0: none)")
    parser.add_argument("--keys", type=int, default=30, help="letters typed (default 30; 0: none)")
    parser.add_argument("--size", default="120x40", help="columns x lines of the terminal (default 120x40)")
    parser.add_argument("--out", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        child(options)
        return
    columns, lines = map(int, options.size.split("x"))
    if options.repeats:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            on_terminal([sys.executable, "-m", "dspark_cli.bench.ui", *sys.argv[1:], "--out", str(out)], columns, lines)
            report_speed(json.loads(out.read_text()), options)
    if options.keys:
        command = [sys.executable, "-m", "dspark_cli", "chat", options.model, "--drafter", options.drafter]
        command += ["--policy", options.policy, "--max-tokens", "4000"]
        waits = sorted(on_terminal(command, columns, lines, options.keys))
        late = waits[min(len(waits) - 1, round(0.95 * len(waits)))]
        print(
            f"key to echo while decoding, {len(waits)} keys: median {median(waits) * 1e3:.0f} ms, "
            f"95 % below {late * 1e3:.0f} ms, longest {waits[-1] * 1e3:.0f} ms"
        )


def report_speed(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    ratios = [row["window"]["tok_s"] / row["generate"]["tok_s"] for row in rows]
    error = stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    same = all(row["window"]["ids"] == row["generate"]["ids"] for row in rows)
    for name in ("generate", "window"):
        speeds = [row[name]["tok_s"] for row in rows]
        print(f"{name:9} {median(speeds):7.1f} tok/s ({min(speeds):.1f}-{max(speeds):.1f})")
    print(
        f"window / generate: median {median(ratios):.3f}, mean {mean(ratios):.3f} +- {error:.3f} "
        f"({min(ratios):.3f}-{max(ratios):.3f}) over {len(rows)} pairs, {options.policy}, {options.size}; "
        f"ids {'identical' if same else 'DIFFERENT'}"
    )
    print(f"CPU of the UI thread: {median(r['window']['ui_cpu_share'] for r in rows):.1%} of the decoding time")


if __name__ == "__main__":
    main()
