"""Downloads against a stand-in of the Hub on loopback, with the real huggingface-hub client."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.registry import download, hub
from dspark_cli.registry.choose import Machine, Wish
from dspark_cli.registry.disk import hub_cache, snapshot
from dspark_cli.registry.download import Silent, pull_files
from dspark_cli.registry.lock import locked, read_lock
from dspark_cli.registry.models import find
from dspark_cli.registry.obtain import obtain, pull
from dspark_cli.registry.plan import Device
from dspark_cli.registry.remove import carry_out, removal
from dspark_cli.registry.resolve import resolve
from hub_server import Fault, HubServer, Repository
from tests_support import own_registry

TARGET, DRAFT = "tester/tiny-GGUF", "tester/tiny-draft-GGUF"
MACHINE = Machine(Device("cpu", "cpu", 16 << 30, 12 << 30))
DATA = random.Random(0)
PARTS = {f"tiny-q4_k_m-{i:05d}-of-00003.gguf": DATA.randbytes(700_000 + i) for i in (1, 2, 3)}
REGISTRY = f"""
[[model]]
name = "tiny"
family = "tiny"
parameters = "1M"
context = 512
n_layer = 2
n_embd = 64
n_head_kv = 1
head_dim = 64
n_vocab = 512
gguf = "{TARGET}"
gguf_files = {{ Q4_K_M = "tiny-q4_k_m.gguf" }}
[[model.drafter]]
kind = "dspark"
format = "gguf"
repository = "{DRAFT}"
file = "tiny-draft-q8_0.gguf"
block_size = 5
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    constants = huggingface_hub.constants
    repositories = {
        TARGET: Repository({**PARTS, "tiny-q8_0.gguf": DATA.randbytes(5000), "README.md": b"small"}),
        DRAFT: Repository({"tiny-draft-q8_0.gguf": DATA.randbytes(300_000), "pytorch_model.bin": b"x" * 2000}),
    }
    own_registry(REGISTRY)
    with HubServer(repositories) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache ü"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(hub, "LONGEST_WAIT_S", 0.05)
        monkeypatch.setattr(download, "CHUNK", 16384)
        huggingface_hub.close_session()
        yield running
        huggingface_hub.close_session()


def pulled_parts() -> dict[str, bytes]:
    folder = snapshot(TARGET)
    assert folder is not None
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


def contents(server: HubServer) -> list[tuple[str, str | None]]:
    """(file, Range) of every request for content."""
    return [
        (path.rpartition("/")[2], span)
        for method, path, span in server.requests
        if method == "GET" and "/resolve/" in path
    ]


def test_only_the_files_needed_and_all_parts(server: HubServer) -> None:
    done = pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    assert {name for name, _ in contents(server)} == {*PARTS, "tiny-draft-q8_0.gguf"}
    assert [item.downloaded for item in done.pulled] == [sum(map(len, PARTS.values())), 300_000]
    entry = locked(TARGET)
    assert entry is not None
    assert entry.revision == server.repositories[TARGET].commit
    assert {n: f.sha256 for n, f in entry.files.items()} == {n: hashlib.sha256(d).hexdigest() for n, d in PARTS.items()}
    found = resolve("tiny", machine=MACHINE)
    assert found.path.name == "tiny-q4_k_m-00001-of-00003.gguf"
    assert found.drafter_path is not None
    assert found.drafter_path.name == "tiny-draft-q8_0.gguf"


def test_a_second_pull_downloads_nothing_and_other_tools_see_the_files(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    server.requests.clear()
    done = pull("tiny", machine=MACHINE, verify=True)
    assert contents(server) == []
    assert sum(item.downloaded for item in done.pulled) == 0
    path = huggingface_hub.try_to_load_from_cache(TARGET, next(iter(PARTS)))
    assert isinstance(path, str)
    assert Path(path).read_bytes() == next(iter(PARTS.values()))


class _Interrupted(Silent):
    """Ctrl-C after so many bytes."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, name: str, n_bytes: int) -> None:
        self.left -= max(0, n_bytes)
        if self.left <= 0:
            raise KeyboardInterrupt


def test_fifty_interruptions_at_random_points_end_with_the_right_files(server: HubServer, tmp_path: Path) -> None:
    """40 Ctrl-C and lost connections in this process, 10 times SIGKILL of another: nothing that arrived is fetched again."""
    chance = random.Random(1)
    script = (
        "import sys; from dspark_cli.registry import download; download.CHUNK = 16384\n"
        "from dspark_cli.registry.obtain import pull; print('go', flush=True); pull('tiny')"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(hub_cache()),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    total = sum(map(len, PARTS.values())) + 300_000
    kinds = ["kill"] * 10 + ["ctrl-c"] * 25 + ["cut"] * 15
    chance.shuffle(kinds)
    server.pause_s = 0.001
    for kind in kinds:
        step = chance.randrange(1000, total // 60)
        if kind == "kill":
            before = server.sent
            process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
            while server.sent < before + step and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        elif kind == "cut":
            # the connection is lost and the user gives up at once
            server.faults.append(Fault(cut=step))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(hub, "TRIES", 1)
                with pytest.raises((NotReady, DsparkError)):
                    pull("tiny", Wish(drafter="dspark"), MACHINE)
            server.faults.clear()
        else:
            with pytest.raises(KeyboardInterrupt):
                pull("tiny", machine=MACHINE, report=_Interrupted(step))
    assert list((hub_cache() / "models--tester--tiny-GGUF" / "blobs").glob("*.incomplete")), "it was done too early"
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    begins: dict[str, list[int]] = {}
    for name, span in contents(server):
        begins.setdefault(name, []).append(int(span.removeprefix("bytes=")[:-1]) if span else 0)
    assert sum(start > 0 for starts in begins.values() for start in starts) >= 25, "most requests continued a file"
    assert all(starts == sorted(starts) for starts in begins.values()), "what had arrived was fetched again"
    assert not list(hub_cache().rglob("*.incomplete"))


def test_a_file_damaged_on_disk_is_fetched_again(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    folder = snapshot(TARGET)
    assert folder is not None
    victim = (folder / "tiny-q4_k_m-00002-of-00003.gguf").resolve()
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    server.requests.clear()
    said: list[str] = []
    report = Silent()
    report.say = said.append  # type: ignore[method-assign]
    pull("tiny", machine=MACHINE, report=report, verify=True)
    assert pulled_parts() == PARTS
    assert [name for name, _ in contents(server)] == ["tiny-q4_k_m-00002-of-00003.gguf"]
    assert "damaged" in said[0]


def test_a_file_damaged_on_the_way_is_fetched_again_once(server: HubServer) -> None:
    server.faults.append(Fault(corrupt=True))
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    server.repositories[TARGET] = Repository({**PARTS, "more-q6_k.gguf": DATA.randbytes(5000)})
    server.faults.extend([Fault(corrupt=True), Fault(corrupt=True)])
    with pytest.raises(DsparkError, match="arrived twice with another hash"):
        pull(TARGET, Wish(quant="Q6_K", drafter="none"), MACHINE, update=True)


def test_a_wrong_partial_file_does_not_survive(server: HubServer) -> None:
    sha = hashlib.sha256(PARTS["tiny-q4_k_m-00001-of-00003.gguf"]).hexdigest()
    blobs = hub_cache() / "models--tester--tiny-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha}.dspark.incomplete").write_bytes(b"rubbish" * 1000)
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=500), Fault(status=502), Fault(status=503)],
        [Fault(status=429, headers=(("Retry-After", "0.01"),))] * 3,
        [Fault(cut=20_000)] * 12,
        [Fault(cut=0)] * 3,
        [Fault(cut=50_000, stall=True)],
        [Fault(cut=100_000), Fault(whole=True)],
        [Fault(status=408), Fault(cut=300_000), Fault(status=500)],
    ],
    ids=["5xx", "429", "truncated", "closed", "stall", "no ranges", "mixed"],
)
def test_what_may_pass_is_tried_again(server: HubServer, faults: list[Fault]) -> None:
    server.faults.extend(faults)
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    assert not server.faults


@pytest.mark.parametrize(
    ("status", "code", "says", "tries"),
    [
        (403, "", "refuses access", 1),
        (401, "GatedRepo", "is gated", 1),
        (404, "EntryNotFound", "is not in the repository", 1),
        (404, "RevisionNotFound", "no such revision", 1),
        (400, "", "answered 400", 1),
        (500, "", "answered 500 after several tries", hub.TRIES),
        (429, "", "answered 429 after several tries", hub.TRIES),
    ],
)
def test_one_clear_line_for_what_does_not_pass(
    server: HubServer, status: int, code: str, says: str, tries: int
) -> None:
    headers = (("X-Error-Code", code),) if code else ()
    server.faults.extend([Fault(status=status, headers=headers)] * (tries + 3))
    with pytest.raises(DsparkError, match=says) as error:
        pull("tiny", machine=MACHINE)
    assert "\n" not in str(error.value)
    assert len(contents(server)) == tries


@pytest.mark.parametrize(("status", "tries"), [(500, hub.TRIES), (403, 1)])
def test_the_listing_is_asked_with_patience_too(server: HubServer, status: int, tries: int) -> None:
    server.info_faults.extend([Fault(status=status)] * (tries + 3))
    with pytest.raises(DsparkError, match=str(status)):
        pull("tiny", machine=MACHINE)
    assert len(server.info_faults) == 3


def test_a_hub_out_of_reach(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotReady, match="cannot be reached"):
        pull("tiny", machine=MACHINE)


def test_a_gated_repository_says_how_to_get_in(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories[TARGET].gated = True
    with pytest.raises(NotReady, match="is gated") as error:
        pull("tiny", machine=MACHINE)
    assert error.value.hint is not None
    assert f"{server.url}/{TARGET}" in error.value.hint
    assert "hf auth login" in error.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS


def test_a_drafter_that_cannot_be_had_is_a_note(server: HubServer) -> None:
    del server.repositories[DRAFT]
    done = pull("tiny", machine=MACHINE)
    assert any(DRAFT in note for note in done.notes)
    with pytest.raises(DsparkError, match=r"is not on .*, or private"):
        pull("tiny", Wish(drafter="dspark"), MACHINE)


def test_names_nobody_has(server: HubServer) -> None:
    with pytest.raises(BadInput, match="unknown model 'tinyy'") as error:
        pull("tinyy", machine=MACHINE)
    assert "tiny" in str(error.value.hint)
    with pytest.raises(DsparkError, match="nobody/nothing is not on"):
        pull("nobody/nothing", machine=MACHINE)


def test_offline_asks_nothing(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotReady, match="no file of tiny is on this machine"):
        obtain("tiny", Wish(), MACHINE)
    with pytest.raises(NotReady, match="network is switched off"):
        pull("tiny", machine=MACHINE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert obtain("tiny", Wish(), MACHINE).drafter_path is not None
    server.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert obtain("tiny", Wish(), MACHINE).drafter_path is not None
    assert server.requests == []


def test_a_revision_stays_pinned_until_update(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    first = locked(TARGET)
    assert first is not None
    newer = {name: data[::-1] for name, data in PARTS.items()}
    old = server.repositories[TARGET]
    server.repositories[TARGET] = Repository(newer)
    # The Hub keeps old commits; this stand-in does not, so a pinned pull of what is here must not need them.
    assert obtain("tiny", Wish(), MACHINE).path.resolve().read_bytes() == PARTS["tiny-q4_k_m-00001-of-00003.gguf"]
    with pytest.raises(DsparkError, match="no such revision"):
        pull("tiny", machine=MACHINE)
    pull("tiny", machine=MACHINE, update=True)
    again = locked(TARGET)
    assert again is not None
    assert again.revision == server.repositories[TARGET].commit != old.commit
    assert pulled_parts() == newer


def test_a_repository_by_name(server: HubServer) -> None:
    done = pull(TARGET, Wish(quant="Q8_0"), MACHINE)
    assert done.choice.quant == "Q8_0"
    assert resolve(TARGET, machine=MACHINE).path.name == "tiny-q8_0.gguf"
    with pytest.raises(NotReady, match="not as Q6_K"):
        pull(TARGET, Wish(quant="Q6_K"), MACHINE)


def test_a_split_file_that_lacks_a_part(server: HubServer) -> None:
    files = dict(server.repositories[TARGET].files)
    del files["tiny-q4_k_m-00002-of-00003.gguf"]
    server.repositories[TARGET] = Repository(files)
    with pytest.raises(DsparkError, match=r"lacks tiny-q4_k_m-00002-of-00003\.gguf of 3 parts"):
        pull("tiny", machine=MACHINE)


def test_names_that_leave_the_folder(server: HubServer) -> None:
    server.repositories[TARGET] = Repository({"../../evil-q4_k_m.gguf": b"x" * 2000})
    with pytest.raises(DsparkError, match="outside its folder"):
        pull("tiny", machine=MACHINE)


def test_two_processes_do_not_collide(server: HubServer) -> None:
    server.pause_s = 0.002
    script = "from dspark_cli.registry.obtain import pull; pull('tiny', verify=True)"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(hub_cache()), "HF_HUB_OFFLINE": "0"}
    both = [subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert pulled_parts() == PARTS
    # Each file crossed the network once: the second process waited for the first.
    assert server.sent == sum(map(len, PARTS.values())) + 300_000


def test_disk_space_is_checked_before_the_first_byte(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=download.SPARE_BYTES + 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NotReady, match=r"needs 2 MB more on disk, .* has 68 MB free"):
        pull("tiny", machine=MACHINE)
    assert contents(server) == []


def test_a_disk_that_fills_up_and_is_cleared(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 900_000
    real = download._write

    def full(sink: Any, chunk: bytes) -> None:
        nonlocal room
        if room < len(chunk):
            real(sink, chunk[:room])
            room = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= len(chunk)
        real(sink, chunk)

    monkeypatch.setattr(download, "_write", full)
    with pytest.raises(NotReady, match=r"is full: tiny-q4_k_m-00002-of-00003\.gguf lacks") as error:
        pull("tiny", machine=MACHINE)
    assert "continues where it stopped" in str(error.value.hint)
    monkeypatch.setattr(download, "_write", real)
    server.requests.clear()
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    spans = dict(contents(server))
    assert (
        spans["tiny-q4_k_m-00002-of-00003.gguf"] == f"bytes={900_000 - len(PARTS['tiny-q4_k_m-00001-of-00003.gguf'])}-"
    )


def test_a_cache_that_may_only_be_read(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so a read-only mount is played by the error it gives."""
    pull("tiny", machine=MACHINE)
    real_open, real_mkdir = Path.open, Path.mkdir

    def refuse(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(str(hub_cache())) and mode[0] in "wa":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, mode, *args, **kwargs)

    def no_mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith(str(hub_cache())) and not path.exists():
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", no_mkdir)
    pull("tiny", machine=MACHINE, verify=True)  # everything is there: nothing must be written
    assert obtain("tiny", Wish(), MACHINE).path.exists()
    with pytest.raises(
        NotReady, match=r"cannot be written \(Read-only file system\), and tiny-q8_0\.gguf is not in it"
    ):
        pull(TARGET, Wish(quant="Q8_0"), MACHINE)


def test_rm_shows_and_frees(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    shown = removal("tiny")
    assert {item.repository: item.freed for item in shown} == {TARGET: sum(map(len, PARTS.values())), DRAFT: 300_000}
    assert carry_out(shown) == sum(map(len, PARTS.values())) + 300_000
    assert not [path for path in hub_cache().rglob("*") if path.is_file() and path.suffix == ".gguf"]
    assert read_lock() == {}
    with pytest.raises(DsparkError, match="nothing of tiny is on this disk"):
        removal("tiny")
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS


def test_rm_keeps_what_another_revision_uses(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    changed = dict(PARTS)
    changed["tiny-q4_k_m-00003-of-00003.gguf"] = b"new" * 1000
    server.repositories[TARGET] = Repository(changed)
    pull("tiny", machine=MACHINE, update=True)
    [target, _] = removal("tiny")
    assert target.freed == 3000  # the other two parts belong to the older snapshot too


def test_a_lock_file_that_is_damaged(server: HubServer) -> None:
    from dspark_cli.registry.lock import lock_file

    pull("tiny", machine=MACHINE)
    lock_file().write_text("{ not json")
    with pytest.raises(DsparkError, match="cannot be read") as error:
        resolve("tiny", machine=MACHINE)
    assert str(lock_file()) in str(error.value.hint)


def test_pull_and_rm_from_the_command_line(server: HubServer, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(hub_cache()), "HF_HUB_OFFLINE": "0"}

    def dspark(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "dspark_cli", *args]
        return subprocess.run(command, env=environment, input=stdin, capture_output=True, timeout=120, check=False)

    done = dspark("pull", "tiny", "--json")
    assert done.returncode == 0, done.stderr.decode()
    facts = json.loads(done.stdout)
    assert facts["drafter"] == DRAFT
    assert len(facts["repositories"][0]["paths"]) == 3
    assert b"hash checked" in done.stderr
    row = json.loads(dspark("models", "tiny", "--json").stdout)
    assert row["on_disk"] == {"Q4_K_M": sum(map(len, PARTS.values()))}
    assert dspark("rm", "tiny").returncode == 2  # nobody there to say yes
    assert f"{DRAFT}: 1 files, 0 MB".encode() in dspark("rm", "tiny", "--dry-run").stdout
    freed = json.loads(dspark("rm", "tiny", "--yes", "--json").stdout)
    assert freed["freed_bytes"] == sum(map(len, PARTS.values())) + 300_000
    gone = dspark("pull", "tiny", "--offline")
    assert gone.returncode == 3
    assert b"switched off" in gone.stderr


def test_the_entry_of_the_users_own_file_is_merged(server: HubServer) -> None:
    assert find("TINY").gguf == TARGET
    listing = hub.list_files(TARGET)
    assert list(hub.quants_in(listing)) == ["Q8_0", "Q4_K_M"]
    pull_files(listing, hub.gguf_parts(listing, None, "Q8_0"))
