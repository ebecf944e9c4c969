"""A server that speaks as much of the Hugging Face hub's API as downloads need, on a port of its own.

huggingface_hub reads HF_ENDPOINT when it is imported, so its users run in processes of their own: `hub.environment()`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


@dataclass
class FakeHub:
    """`repos[name][commit][file]` are bytes; `refs[name][branch]` is a commit."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each, in order."""
    cut: dict[str, int] = field(default_factory=dict)
    """Downloads of these files end after half their bytes, so many times."""
    hold: threading.Event | None = None
    """If set, downloads of weights wait for it."""
    broken: bool = False
    """Every request is answered with status 500."""

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch; returns the commit."""
        text = repr([(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def add_folder(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Commit a folder's files."""
        return self.add(repo, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, branch)

    def downloads(self) -> Counter[str]:
        """How often each file's contents were asked for."""
        return Counter(
            path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path
        )

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a client's environment needs to use this hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            self._error(500, "", "the hub is out of order")
            return
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or tree or file
        repo = found[1] if found else ""
        allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if repo not in self.hub.repos or (repo in self.hub.private and not allowed):
            # As the hub does, which does not tell strangers what exists.
            self._error(404 if allowed else 401, "RepoNotFound", "Repository not found")
            return
        assert found is not None
        revision = found[2] or "main"
        commit = self.hub.refs[repo].get(revision, revision)
        files = self.hub.repos[repo].get(commit)
        if files is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif info:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        elif tree:
            self._json([_tree_entry(name, data) for name, data in files.items()])
        elif repo in self.hub.gated and not allowed:
            self._error(401, "GatedRepo", f"Access to model {repo} is restricted. You must have access to it.")
        elif found[3] not in files:
            self._error(404, "EntryNotFound", "Entry not found", commit)
        else:
            self._file(commit, found[3], files[found[3]])

    def _file(self, commit: str, name: str, data: bytes) -> None:
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        if asked:
            start = int(asked[1])
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.hold is not None and name.endswith(".safetensors"):
            self.hub.hold.wait(300)
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        body = b"" if self.command == "HEAD" else json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
