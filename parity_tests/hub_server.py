"""A server that speaks the protocol of Hugging Face's hub: what huggingface_hub asks of it to list,
fetch and push files. Faults are switched on by the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def git_sha(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Hub:
    """Repositories by name, and how the server misbehaves.

    Attributes:
      files: ``{repository: {file: content}}``; weights are kept as large files, by their SHA-256.
      status: Answered to everything, if it is set.
      corrupt: Names of files of which one byte is changed on the way.
      cut: Bytes after which the connection of a download ends, for the next so many downloads.
      chunk, pause: Downloads are sent in pieces of so many bytes with so many seconds between.
      requests: ``METHOD path`` of every request, with the bytes that were asked for.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: int | None = None
    error_code: str = ""
    corrupt: set[str] = field(default_factory=set)
    cut: list[int] = field(default_factory=list)
    chunk: int = 1 << 16
    pause: float = 0.0
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    uploads: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def commit(self, repository: str) -> str:
        """Changes with the content."""
        files = sorted((name, git_sha(data)) for name, data in self.files[repository].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refused(self) -> bool:
        asked = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {asked}".strip())
        if self.hub.status is not None:
            self._read()
            self._answer({"error": "no"}, self.hub.status, X_Error_Code=self.hub.error_code)
            return True
        return False

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _repository(self, rest: str) -> tuple[str, list[str]]:
        """The repository that a path begins with, and what follows."""
        parts = rest.partition("?")[0].strip("/").split("/")
        return "/".join(parts[:2]), parts[2:]

    def _missing(self, code: str) -> None:
        self._answer({"error": "not there"}, 404, X_Error_Code=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._refused():
            return None
        if self.path.startswith("/api/models/"):
            name, rest = self._repository(self.path.removeprefix("/api/models/"))
            if name not in self.hub.files:
                return self._missing("RepoNotFound")
            commit = self.hub.commit(name)
            revision = rest[1] if rest else "main"
            if revision not in ("main", commit):
                return self._missing("RevisionNotFound")
            files = [{"rfilename": file} for file in self.hub.files[name]]
            return self._answer({"id": name, "sha": commit, "siblings": files})
        if self.path.startswith("/plain/"):
            return self._send(self.path.rpartition("/")[2], self.hub.uploads[self.path], {})
        name, (_, revision, *parts) = self._repository(self.path)
        file, files = "/".join(parts), self.hub.files.get(name, {})
        if file not in files:
            return self._missing("EntryNotFound")
        data = files[file]
        large = file.endswith((".safetensors", ".bin"))
        etag = hashlib.sha256(data).hexdigest() if large else git_sha(data)
        headers = {"X-Repo-Commit": self.hub.commit(name), "ETag": f'"{etag}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return self._send(file, data, headers)

    def _send(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start and start >= len(data):
            return self._answer({}, 416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if file in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        end = len(data)
        if self.hub.cut:
            end = start + self.hub.cut.pop(0)
        for place in range(start, end, self.hub.chunk):
            self.wfile.write(data[place : min(place + self.hub.chunk, end)])
            if self.hub.pause:
                self.wfile.flush()
                threading.Event().wait(self.hub.pause)
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(2)
        return None

    def do_POST(self) -> None:
        if self._refused():
            return None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = self._read()
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if token not in self.hub.tokens:
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = "/".join(filter(None, (content.get("organization") or "user", content["name"])))
            self.hub.files.setdefault(name, {})
            return self._answer({"url": f"{self.hub.url}/{name}", "name": name})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}},
                }
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        name, (what, *_) = self._repository(self.path.removeprefix("/api/models/"))
        if what == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[name][value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.commit(name)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self._answer({"success": True, "commitOid": commit, "commitUrl": url})

    def do_PUT(self) -> None:
        if self._refused():
            return
        data = self._read()
        self.hub.uploads[self.path.rpartition("/")[2]] = data
        self._answer({})


@contextmanager
def serving() -> Iterator[Hub]:
    """A server on this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that was interrupted
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
