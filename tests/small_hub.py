"""A Hugging Face hub on the loopback: the questions of its protocol that a download asks.

One decision: the real client talks to it, so what is tested is our use of the client and not an idea of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TROUBLE = {"gated": (403, "GatedRepo"), "busy": (503, ""), "closed": (401, "")}


class SmallHub(BaseHTTPRequestHandler):
    """Repositories `acme/NAME` of two kinds; `gated`, `busy` and `closed` are what they are called."""

    repositories: dict[str, Path]
    """`models/acme/NAME` or `datasets/acme/NAME` → folder with its files."""
    asked: list[str]
    tokens: list[str]

    def log_message(self, *arguments: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.asked.append(f"{self.command} {path}")
        self.tokens.append(self.headers.get("Authorization") or "")
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:])
            return
        repository = parts if parts[0] == "datasets" else ["models", *parts]
        folder = self.repositories.get("/".join(repository[:3]))
        if folder and repository[3:5] == ["resolve", COMMIT]:
            self._file(folder / "/".join(repository[5:]))
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _api(self, parts: list[str]) -> None:
        folder, question, revision = self.repositories.get("/".join(parts[:3])), parts[3:4], parts[4:5] or ["main"]
        if parts[2] in TROUBLE:
            status, code = TROUBLE[parts[2]]
            self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif folder is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision[0] not in ("main", COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif question == ["tree"]:
            self._json([{"type": "directory", "path": "data", "oid": "0", "size": 0}, *self._entries(folder)])
        else:
            siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in self._entries(folder)]
            name = "/".join(parts[1:3])
            self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})

    def _entries(self, folder: Path) -> list[dict[str, Any]]:
        entries = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entry = {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
            lfs = {"oid": digest, "size": entry["size"], "pointerSize": 130} if path.suffix == ".parquet" else None
            entries.append(entry | {"oid": digest[:40], **({"lfs": lfs} if lfs else {})})
        return entries

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._answer(200, data, headers)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free port of the loopback; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def hub_of(**repositories: Path) -> type[SmallHub]:
    """A hub with these repositories: `models_NAME=folder` or `datasets_NAME=folder`."""
    named = {
        f"{kind}/acme/{name}": path for key, path in repositories.items() for kind, _, name in [key.partition("_")]
    }
    return type("Hub", (SmallHub,), {"repositories": named, "asked": [], "tokens": []})
