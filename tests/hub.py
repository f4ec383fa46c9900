"""A small Hugging Face hub on this machine: what huggingface_hub asks to make, fill and read repos.

Large files go by LFS, small ones with the commit, as on the real one.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_writes"


class Hub:
    """Repositories: ``repos[name]`` is a list of commits, newest last, each file → bytes."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.lfs: dict[str, bytes] = {}
        self.lfs_files: set[str] = set()
        self.messages: list[str] = []
        self.url = ""

    def sha(self, repo: str, index: int) -> str:
        return hashlib.sha1(f"{repo}-{index}".encode()).hexdigest()

    def at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        commits = self.repos[repo]
        if revision == "main":
            return commits[-1] if commits else {}
        for index, files in enumerate(commits):
            if revision == self.sha(repo, index) or revision == f"v{index}":
                return files
        return None

    def resolved(self, repo: str, revision: str) -> str:
        files = self.at(repo, revision)
        return self.sha(repo, next(i for i, f in enumerate(self.repos[repo]) if f is files))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def writes(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        hub, path, data = self.hub, unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            text = json.loads(data)["content"]
            front = yaml.safe_load(text.split("---")[1])
            errors = [] if isinstance(front, dict) else [{"message": "no front matter"}]
            return self.answer(200 if not errors else 400, {"warnings": [], "errors": errors})
        if not self.writes():
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            given = json.loads(data)
            name = f"{given['organization']}/{given['name']}"
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, [])
            private = given.get("private") or given.get("visibility") == "private"
            hub.private.setdefault(name, bool(private))
            return self.answer(status, {"url": f"{hub.url}/{name}", "id": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": f["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(data)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(found[1], data)
        return self.answer(404)

    def commit(self, repo: str, data: bytes) -> None:
        hub, files = self.hub, dict(self.hub.at(repo, "main") or {})
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
                hub.lfs_files.add(value["path"])
        hub.repos[repo].append(files)
        oid = hub.sha(repo, len(hub.repos[repo]) - 1)
        url = f"{hub.url}/{repo}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def do_PUT(self) -> None:
        oid, data = self.path.rpartition("/")[2], self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.lfs[oid] = data
        self.answer(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        found = re.fullmatch(
            r"(?:/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)"
            r"|/([^/]+/[^/]+)/resolve/([^/]+)/(.+))",
            path,
        )
        if not found:
            return self.answer(404)
        repo, revision = found[1] or found[3], found[2] or found[4]
        if repo not in hub.repos or (hub.private[repo] and not self.writes()):
            return self.answer(401, {"error": "no repo"}, X_Error_Code="RepoNotFound")
        files = hub.at(repo, revision)
        if files is None:
            return self.answer(404, {"error": "no rev"}, X_Error_Code="RevisionNotFound")
        sha = hub.resolved(repo, revision)
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            return self.answer(200, tree)
        if found[5] is None:
            names = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repo, "sha": sha, "siblings": names})
        data = files.get(found[5])
        if data is None:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.answer(200, data, ETag=etag, X_Repo_Commit=sha)


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, with an empty cache and no token."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "-token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
