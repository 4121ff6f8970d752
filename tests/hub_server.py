"""A stand-in for the Hub on loopback, for tests only: the resolve and metadata endpoints, with faults on demand.

The client is the real huggingface-hub. A fault is taken off the list by the next request for a file's content.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"^/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)$")
_INFO = re.compile(r"^/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^?]+))?")
PIECE = 8192


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    status: answer this instead; cut: close the connection after so many bytes; stall: send nothing more after `cut`
    corrupt: flip a bit of every piece; whole: ignore the Range header
    """

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    stall: bool = False
    corrupt: bool = False
    whole: bool = False


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    commit: str = ""
    large: int = 1000  # files of at least so many bytes are LFS files with a sha256

    def __post_init__(self) -> None:
        content = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        self.commit = hashlib.sha1(content).hexdigest()

    def blob(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def sha256(self, name: str) -> str | None:
        data = self.files[name]
        return hashlib.sha256(data).hexdigest() if len(data) >= self.large else None


@dataclass
class HubServer:
    """Repositories by name; `url` is what HF_ENDPOINT must be.

    requests: (method, path, Range) of all so far; trusted: hosts that were shown a token
    elsewhere: content of large files is on another host, to which resolve redirects, as the Hub does it
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: deque[Fault] = field(default_factory=deque)
    info_faults: deque[Fault] = field(default_factory=deque)
    head_faults: deque[Fault] = field(default_factory=deque)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    trusted: set[str] = field(default_factory=set)
    elsewhere: bool = False
    pause_s: float = 0.0
    sent: int = 0

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        host = str(self.headers.get("Host")).partition(":")[0]
        if self.headers.get("Authorization"):
            self.hub.trusted.add(host)
        try:
            path = unquote(urlsplit(self.path).path)  # through a proxy the path is a whole URL
            if info := _INFO.match(path):
                self._info(info[1], info[2] or "main")
            elif file := _RESOLVE.match(path):
                self._file(file[1], file[2], file[3], body)
            else:
                self._status(404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _status(self, code: int, headers: tuple[tuple[str, str], ...] = ()) -> None:
        self.send_response(code)
        for key, value in (*headers, ("Content-Length", "0")):
            self.send_header(key, value)
        self.end_headers()

    def _found(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._status(404, (("X-Error-Code", "RepoNotFound"),))
        elif revision not in ("main", repository.commit):
            self._status(404, (("X-Error-Code", "RevisionNotFound"),))
            return None
        return repository

    def _info(self, name: str, revision: str) -> None:
        if self.hub.info_faults:
            fault = self.hub.info_faults.popleft()
            self._status(fault.status or 500, fault.headers)  # 200: an answer without content
            return
        repository = self._found(name, revision)
        if repository is None:
            return
        siblings = []
        for file, data in repository.files.items():
            row: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": repository.blob(file)}
            if sha256 := repository.sha256(file):
                row["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(row)
        payload = json.dumps({"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        repository = self._found(name, revision)
        if repository is None:
            return
        if repository.gated and not self.headers.get("authorization"):
            self._status(401, (("X-Error-Code", "GatedRepo"),))
            return
        if file not in repository.files:
            self._status(404, (("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", repository.commit)))
            return
        if self.hub.elsewhere and repository.sha256(file) and "localhost" not in str(self.headers.get("Host")):
            self._redirect(repository, file)
            return
        faults = self.hub.faults if body else self.hub.head_faults
        fault = faults.popleft() if faults else Fault()
        if fault.status is not None:
            self._status(fault.status, fault.headers)
            return
        self._content(repository, file, body, fault)

    def _redirect(self, repository: Repository, file: str) -> None:
        """What the file is, and where its content lies."""
        place = f"http://localhost:{self.server.server_address[1]}{self.path}"  # type: ignore[str-bytes-safe]
        about = (
            ("X-Repo-Commit", repository.commit),
            ("X-Linked-Etag", f'"{repository.sha256(file)}"'),
            ("X-Linked-Size", str(len(repository.files[file]))),
        )
        self._status(302, (("Location", place), *about))

    def _content(self, repository: Repository, file: str, body: bool, fault: Fault) -> None:
        data = repository.files[file]
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted and not fault.whole else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{repository.sha256(file) or repository.blob(file)}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self._send(data[start:], fault)

    def _send(self, data: bytes, fault: Fault) -> None:
        end = len(data) if fault.cut is None else min(fault.cut, len(data))
        for at in range(0, end, PIECE):
            piece = data[at : min(at + PIECE, end)]
            if fault.corrupt:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            if self.hub.pause_s:
                time.sleep(self.hub.pause_s)
        if fault.stall:
            time.sleep(5)
        if fault.cut is not None:
            # A reset, as a router that loses a connection gives, and not a tidy end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
