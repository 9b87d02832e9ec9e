"""A hub over HTTP on this machine: repositories of few files, each at named commits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """What the hub has: files by commit and path. `refs` are branches and tags.

    `served` takes the place of a file's bytes after they were listed.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    token: str = ""
    asked: list[str] = field(default_factory=list)

    def add(self, commit: str, folder: Path, below: str = "") -> None:
        """Adds a folder's files to a commit."""
        found = self.files.setdefault(commit, {})
        for file in folder.iterdir():
            found[f"{below}{file.name}"] = file.read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub's interface does, as far as it is used here."""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self.answer(self.rfile.read(length))

    def answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if self.hub.token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self.reply(401, {"error": "Invalid credentials secret-header"})
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) == "org/name":
            return self.about(parts[4:], body)
        if parts[:2] == ["org", "name"] and parts[2] == "resolve":
            found = self.hub.files.get(self.commit(parts[3]), {}).get("/".join(parts[4:]))
            if found is not None:
                return self.send(200, self.hub.served.get(parts[-1], found), "application/data")
        return self.reply(404, {"error": "Repository not found"}, "RepoNotFound")

    def about(self, rest: list[str], body: bytes) -> None:
        commit = self.commit(rest[1] if len(rest) > 1 else "main")
        if commit not in self.hub.files:
            return self.reply(404, {"error": "no such revision"}, "RevisionNotFound")
        files = self.hub.files[commit]
        if not rest or rest[0] == "revision":
            return self.reply(200, {"id": "org/name", "sha": commit, "siblings": []})
        if rest[0] == "tree":
            below = "/".join(rest[2:])
            found = list(self.tree(files, f"{below}/" if below else ""))
            return self.reply(200, found) if found else self.reply(404, {}, "EntryNotFound")
        paths = parse_qs(body.decode()).get("paths", []) if rest[0] == "paths-info" else []
        entries = [self.entry(path, files[path]) for path in paths if path in files]
        folders = [p for p in paths if any(name.startswith(f"{p}/") for name in files)]
        entries += [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
        return self.reply(200, entries)

    def tree(self, files: dict[str, bytes], below: str) -> Iterator[dict[str, Any]]:
        for path in sorted(files):
            rest = path.removeprefix(below)
            if path.startswith(below) and "/" not in rest:
                yield self.entry(path, files[path])
        inside = (p.removeprefix(below) for p in files if p.startswith(below))
        for name in sorted({each.split("/")[0] for each in inside if "/" in each}):
            yield {"type": "directory", "path": f"{below}{name}", "oid": "0" * 40}

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        found = {"type": "file", "path": path, "size": len(data), "oid": "1" * 40}
        if path.endswith(".safetensors"):
            digest = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return found

    def commit(self, revision: str) -> str:
        return self.hub.refs.get(revision, revision)

    def reply(self, status: int, value: Any, code: str = "") -> None:
        self.send(status, json.dumps(value).encode(), "application/json", code)

    def send(self, status: int, data: bytes, kind: str, code: str = "") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-repo-commit", "0" * 40)
        if code:
            self.send_header("x-error-code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers until the context ends."""
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, found))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
