"""Downloads against a stand-in of the Hub on loopback, with the real huggingface-hub client: resume, hashes, faults."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from dspark_cli.backends.errors import DsparkError, NotReady
from dspark_cli.registry import hub
from dspark_cli.registry.choose import Wish
from dspark_cli.registry.disk import hub_cache, snapshot
from dspark_cli.registry.download import Silent
from dspark_cli.registry.lock import locked
from dspark_cli.registry.obtain import pull
from dspark_cli.registry.resolve import resolve
from hub_server import Fault, HubServer, Repository
from tiny_hub import DATA, MACHINE, PARTS, TARGET, contents, pulled_parts


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


def test_content_on_another_host_is_resumed_there_and_never_sees_the_token(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub answers resolve with a redirect to its content network."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server.elsewhere = True
    server.faults.extend([Fault(cut=100_000), Fault(status=503), Fault(cut=200_000)])
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    assert not server.faults
    assert server.trusted == {"127.0.0.1"}
    spans = [span for name, span in contents(server) if name == "tiny-q4_k_m-00001-of-00003.gguf" and span]
    assert [span for span in spans if span != "bytes=100000-"], "it did not go on where the second loss left it"


@pytest.mark.parametrize(("status", "says"), [(403, "refuses access"), (404, "answered 404")])
def test_a_refusal_while_a_finished_file_is_linked(server: HubServer, status: int, says: str) -> None:
    """huggingface-hub asks about the file once more: what it was told is what the user hears, and the bytes stay."""
    server.head_faults.append(Fault(status=status))
    with pytest.raises(DsparkError, match=says) as error:
        pull("tiny", machine=MACHINE)
    assert "not in the repository" not in str(error.value)
    server.requests.clear()
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    assert "tiny-q4_k_m-00001-of-00003.gguf" not in dict(contents(server))


def test_a_network_that_answers_everything_itself(server: HubServer) -> None:
    """A log-in page: 200, and no list of files."""
    server.info_faults.append(Fault(status=200))
    with pytest.raises(DsparkError, match="does not seem to be a Hub") as error:
        pull("tiny", machine=MACHINE)
    assert "log in" in str(error.value.hint)


class _Crooked(Repository):
    """States a hash that is a path."""

    def sha256(self, name: str) -> str:
        return "../../../../evil"


def test_hashes_that_are_paths(server: HubServer) -> None:
    server.repositories[TARGET] = _Crooked(dict(PARTS))
    with pytest.raises(DsparkError, match="no usable hash for tiny-q4_k_m-00001"):
        pull("tiny", machine=MACHINE)
    assert contents(server) == []


def test_a_hub_out_of_reach(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotReady, match="cannot be reached"):
        pull("tiny", machine=MACHINE)


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
