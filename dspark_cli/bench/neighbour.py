"""What a busy neighbour costs, with dspark's GOMP_SPINCOUNT and with libgomp's own default, taken in turn.

    python -m dspark_cli.bench.neighbour

Each figure is a process of its own, since libgomp reads the variable when it loads. Neighbours: none, one busy thread, and
another decoding session with the same setting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

REPEATS = 3
SETTINGS = ("dspark", "libgomp")
SPIN = "while True: pass"
# `libgomp`: the library loads, and reads its environment, before dspark sets the variable.
SESSION = """
import sys
if sys.argv[1] == "libgomp":
    import llama_cpp
from dspark_cli.engine.rounds import SamplingOptions
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.engine.stats import Stats
from dspark_cli.registry import resolve
with Session.open(OpenOptions(resolve("smollm2-135m").path, "smollm2-135m", drafter="none")) as session:
    while True:
        stats = Stats()
        for item in session.run(session.text_request("1 2 3 4", max_tokens=40, sampling=SamplingOptions())):
            stats.add(item)
        if sys.argv[2] == "once":
            print(f"{stats.decode_tok_s:.1f}")
            break
"""


def session(setting: str, how: str) -> list[str]:
    return [sys.executable, "-c", SESSION, setting, how]


@contextmanager
def neighbour(command: list[str] | None, environment: dict[str, str]) -> Iterator[None]:
    """Something else that runs meanwhile."""
    if command is None:
        yield
        return
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(3)
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    kinds = {"nobody": None, "one busy thread": [sys.executable, "-c", SPIN], "another session": ["session"]}
    for name, command in kinds.items():
        speeds: dict[str, list[str]] = {setting: [] for setting in SETTINGS}
        for _ in range(REPEATS):
            for setting in SETTINGS:
                beside = session(setting, "forever") if command == ["session"] else command
                with neighbour(beside, environment):
                    done = subprocess.run(
                        session(setting, "once"), env=environment, capture_output=True, text=True, check=True
                    )
                speeds[setting].append(done.stdout.strip())
        print(f"beside {name}: " + "; ".join(f"{s} {', '.join(v)} tok/s" for s, v in speeds.items()), flush=True)


if __name__ == "__main__":
    main()
