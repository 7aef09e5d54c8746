"""A Hugging Face hub on the loopback: the questions of its protocol that a download asks, and a push; and ModelScope.

One decision: the real client talks to it, so what is tested is our use of the client and not an idea of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

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


class TakingHub(SmallHub):
    """A hub that also takes pushes: weights by the LFS protocol, the rest in the commit itself."""

    received: dict[str, bytes]
    """Path → bytes, of the last commit and those before it."""
    objects: dict[str, bytes]
    """sha256 → bytes sent by LFS."""
    created: list[dict[str, Any]]
    known: str = "hf_known"

    def do_POST(self) -> None:
        path, body = self._told()
        if self.headers.get("Authorization") != f"Bearer {self.known}":
            self._answer(401, b'{"error": "Invalid username or password."}', {})
        elif path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._json({"url": f"http://{self.headers['Host']}/acme/{json.loads(body)['name']}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": self._mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                thing | {"actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, b"{}", {})

    def do_PUT(self) -> None:
        path, body = self._told()
        assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
        self.objects[path.rpartition("/")[2]] = body
        self._answer(200, b"", {})

    def _told(self) -> tuple[str, bytes]:
        path = unquote(self.path.split("?")[0])
        self.asked.append(f"{self.command} {path}")
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _mode(self, path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.received[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.received[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.received[value["path"]]
        url = f"http://{self.headers['Host']}/acme/mine/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def _api(self, parts: list[str]) -> None:
        """Of a repository that was made here: whether it is private, and what it holds."""
        if self.headers.get("Authorization") not in (None, f"Bearer {self.known}"):
            self._answer(401, b'{"error": "Invalid username or password."}', {})
        elif parts[0] != "models" or parts[2] not in ("mine", "open"):
            super()._api(parts)
        elif parts[3:4] == ["tree"]:
            files = [{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in sorted(self.received.items())]
            self._json(files)
        else:
            siblings = [{"rfilename": path} for path in sorted(self.received)]
            name = "/".join(parts[1:3])
            self._json({"id": name, "sha": COMMIT, "private": parts[2] == "mine", "siblings": siblings})


def taking_hub() -> type[TakingHub]:
    """A hub that takes pushes: `acme/mine` is a private repository, `acme/open` a public one."""
    fresh = {"repositories": {}, "asked": [], "tokens": [], "received": {}, "objects": {}, "created": []}
    return type("Hub", (TakingHub,), fresh)


class SmallModelScope(BaseHTTPRequestHandler):
    """ModelScope's questions about data sets: what files there are, and one of them."""

    repositories: dict[str, Path]
    """`acme/NAME` → folder with its files."""
    asked: list[str]
    damaged: bool = False

    def log_message(self, *arguments: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        parts = path.strip("/").split("/")
        self.asked.append(f"{self.command} {unquote(self.path)}")
        folder = self.repositories.get("/".join(parts[3:5]))
        if parts[3:5] == ["acme", "busy"]:
            self._answer(503, b"{}")
        elif folder is None or asked.get("Revision") not in ("master", "v1"):
            self._answer(404, b'{"Code": 10010205001, "Message": "not found", "Success": false}')
        elif parts[5:] == ["repo", "tree"]:
            page, size = int(asked["PageNumber"]), int(asked["PageSize"])
            entries = [self._entry(folder, file) for file in sorted(folder.rglob("*"))][(page - 1) * size : page * size]
            self._answer(200, json.dumps({"Code": 200, "Data": {"Files": entries}, "Success": True}).encode())
        else:
            data = (folder / asked["FilePath"]).read_bytes()
            self._answer(200, data[::-1] if self.damaged else data)

    def _entry(self, folder: Path, file: Path) -> dict[str, Any]:
        entry = {"Path": file.relative_to(folder).as_posix(), "Name": file.name, "Type": "tree", "Size": 0}
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            entry |= {"Type": "blob", "Size": file.stat().st_size, "Sha256": digest}
        return entry

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
