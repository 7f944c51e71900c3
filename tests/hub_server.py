"""A hub for data sets on this machine: as much of the hub's interface as its real client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
"""The commit of `main`."""


class HubServer(ThreadingHTTPServer):
    """Serves data sets of one revision each.

    Args:
        sets: of each `owner/name`: its files, path -> content.
        failing: of an `owner/name`: answer with this status; 0: take the question and say nothing for 5 s.

    Attributes:
        requests: what was asked, `GET /path`, in order.
        tokens: what stood in the headers `Authorization`.
    """

    daemon_threads = True

    def __init__(self, sets: Mapping[str, Mapping[str, bytes]], failing: Mapping[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sets = sets
        self.failing = failing
        self.ended = threading.Event()
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def end(self) -> None:
        """Listen no more, and leave those waiting."""
        self.ended.set()
        self.shutdown()
        self.server_close()

    @property
    def endpoint(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.server.tokens.add(token)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self._resolve("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._send(404, b"")

    def _files(self, repo: str, revision: str | None) -> Mapping[str, bytes] | None:
        """Return a set's files; None where that has been answered."""
        status = self.server.failing.get(repo)
        if status is not None:
            self._send(status, b"") if status else self.server.ended.wait(5)
        elif repo not in self.server.sets:
            self._fault("RepoNotFound", 401)
        elif revision not in (None, "main", COMMIT):
            self._fault("RevisionNotFound")
        else:
            return self.server.sets[repo]
        return None

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        if name not in files:
            self._fault("EntryNotFound")
            return
        self._send(200, files[name], {"ETag": f'"{_sha1(files[name])}"', "X-Repo-Commit": COMMIT})

    def _api(self, repo: str, rest: list[str], body: bytes) -> None:
        revision = rest[1] if len(rest) > 1 else None
        files = self._files(repo, revision)
        if files is None:
            return
        entries = [_entry(name, content) for name, content in files.items()]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0})
        elif rest[0] == "tree":
            within = "".join(f"{part}/" for part in rest[2:])
            below = [entry for entry in entries if entry["path"].startswith(within)]
            names = {entry["path"].removeprefix(within).partition("/")[0] for entry in below}
            folders = [_folder(within + name) for name in sorted(names) if _is_folder(within + name, files)]
            self._json([*folders, *(entry for entry in below if "/" not in entry["path"].removeprefix(within))])
        elif rest[0] == "paths-info":
            wanted = json.loads(body)["paths"]
            folders = [_folder(path) for path in wanted if _is_folder(path, files)]
            self._json([*(entry for entry in entries if entry["path"] in wanted), *folders])
        else:
            self._send(404, b"")

    def _fault(self, code: str, status: int = 404) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": _sha1(content), "size": len(content), "path": name}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": COMMIT, "path": path}


def _is_folder(path: str, files: Mapping[str, bytes]) -> bool:
    return any(name.startswith(f"{path}/") for name in files)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
