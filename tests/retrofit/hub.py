"""A hub in a thread: the parts of its HTTP interface that gates need, repositories in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories of the server: name to files."""

    server: Any

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, code: int = 200, **headers: str) -> None:
        self._send(code, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _missing(self) -> None:
        self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.repositories:
                self._missing()
                return
            files = sorted(self.server.repositories[name])
            if parts[4:5] == ["tree"]:
                sizes = {f: len(c) for f, c in self.server.repositories[name].items()}
                self._json(
                    [{"type": "file", "path": f, "size": n, "oid": "0" * 40}
                     for f, n in sizes.items()]
                )  # fmt: skip
                return
            self._json(
                {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                 "likes": 0, "siblings": [{"rfilename": file} for file in files]}
            )  # fmt: skip
            return
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        files = self.server.repositories.get(name)
        if files is None or file not in files or parts[2:3] != ["resolve"]:
            self._missing()
            return
        tag = hashlib.sha256(files[file]).hexdigest()
        self._send(200, files[file], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.headers.get("Authorization"):
            self._json({"error": "Invalid username or password."}, 401)
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = asked.get("visibility") == "private"
            self._json({"url": f"{self.server.url}/{name}", "id": name})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                           for f in files]}
            )  # fmt: skip
        elif "/commit/" in path:
            name = "/".join(path.strip("/").split("/")[2:4])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[name][entry["value"]["path"]] = content
                elif entry["key"] == "header":
                    self.server.messages.append(entry["value"]["summary"])
            where = f"{self.server.url}/{name}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": where})
        else:  # checks of a card's YAML
            self._json({"errors": [], "warnings": []})


@contextlib.contextmanager
def hub() -> Iterator[Any]:
    """A running server with ``url``, ``repositories``, ``private`` and ``messages``."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.private, server.messages = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
