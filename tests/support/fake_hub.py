"""A small hub on this machine: a real HTTP server that speaks what huggingface_hub asks, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def commit_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """`revisions`: name -> commit; `commits`: commit -> file -> bytes."""

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False


@dataclass
class FakeHub:
    """Repositories by name. Requests that came are in `seen`: method, path and headers in lower case.

    Attributes:
        token: whoever sends it has access to gated repositories.
        moved: repository -> the name that it has now (the hub redirects with a relative address).
        cdn: files are redirected to this address, as large ones are.
        told_sizes: file -> size that the list of files says, whatever it has.
        cut: file -> bytes after which the connection ends.
        pause: seconds before each piece of a file of `piece` bytes.
        broken: status that every request gets.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    token: str = "hf_operator"
    moved: dict[str, str] = field(default_factory=dict)
    cdn: str | None = None
    told_sizes: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    pause: float = 0.0
    piece: int = 2**16
    broken: int | None = None
    hold: threading.Event | None = None
    url: str = ""

    def add(self, name: str, files: dict[str, bytes] | Path, *, revision: str = "main") -> str:
        """A new commit on a branch; returns it."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in sorted(files.iterdir())}
        repository = self.repositories.setdefault(name, Repository())
        digests = sorted((file, hashlib.sha256(data).hexdigest()) for file, data in files.items())
        commit = commit_of(f"{name} {digests}")
        repository.commits[commit] = dict(files)
        repository.revisions[revision] = commit
        return commit

    def count(self, method: str, ending: str) -> int:
        """Requests of this method whose path ends so."""
        return sum(one == method and path.endswith(ending) for one, path, _ in self.seen)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if self.hub.hold is not None:
            self.hub.hold.wait(30)
        if self.hub.broken is not None:
            return self._send(self.hub.broken, b"broken")
        if path.startswith("/cdn/"):
            return self._file(path.removeprefix("/cdn/").split("/")[-1], self._blob(path))
        if info := _INFO.fullmatch(path):
            return self._info(info[1], info[2] or "main")
        if file := _FILE.fullmatch(path):
            return self._resolve(file[1], file[2], file[3])
        return self._send(404, b"{}")

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; otherwise it has answered."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        if repository.gated and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return None
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return None
        return commit, repository.commits[commit]

    def _info(self, name: str, revision: str) -> None:
        found = self._found(self.hub.moved.get(name, name), revision)
        if found is None:
            return
        commit, files = found
        siblings = [
            {"rfilename": file, "size": self.hub.told_sizes.get(file, len(data)), "blobId": commit_of(file)}
            for file, data in files.items()
        ]
        self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if name in self.hub.moved:
            return self._send(307, b"", {"Location": f"/{self.hub.moved[name]}/resolve/{revision}/{file}"})
        found = self._found(name, revision)
        if found is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            return self._send(404, b"{}", headers | {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        if self.hub.cdn is not None and file.endswith(".safetensors"):
            size = str(self.hub.told_sizes.get(file, len(files[file])))
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": size}
            return self._send(302, b"", headers | {"Location": f"{self.hub.cdn}/cdn/{name}/{commit}/{file}"})
        self._file(file, files[file], headers | {"ETag": etag})

    def _blob(self, path: str) -> bytes:
        owner, name, commit, file = path.removeprefix("/cdn/").split("/")
        return self.hub.repositories[f"{owner}/{name}"].commits[commit][file]

    def _file(self, file: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        start = 0
        if (asked := self.headers.get("range")) and self.command == "GET":
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        for key, value in ({"Content-Length": str(len(data) - start)} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = min(len(data), self.hub.cut.get(file, len(data)))
        try:
            for at in range(start, end, self.hub.piece):
                if self.hub.pause:
                    time.sleep(self.hub.pause)
                self.wfile.write(data[at : min(at + self.hub.piece, end)])
        except OSError:
            return  # nobody listens any more
        if end < len(data):
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub(hub: FakeHub | None = None) -> Iterator[FakeHub]:
    """A hub that answers at its `url` while the context lasts."""
    hub = hub or FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


def point_to(hub: FakeHub, setenv: Callable[[str, str], None], home: Path) -> None:
    """Have processes that are started from now on ask this hub, with a cache of their own and little patience."""
    setenv("HF_ENDPOINT", hub.url)
    setenv("HF_HOME", str(home))
    setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
    setenv("HF_HUB_ETAG_TIMEOUT", "2")
    setenv("HF_HUB_DISABLE_XET", "1")
    setenv("NO_PROXY", "*")
