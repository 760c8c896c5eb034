"""A Hugging Face hub of one repository, on this machine: what the library asks to upload and to fetch small files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Attributes: `files`, content by path; `asked`, the paths of files that were fetched; `tokens` that were shown."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing in the test's output."""

    def answer(self, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        files = self.server.files
        if path.startswith("/user/name/resolve/"):
            name = path.split("/", 5)[5]
            if self.command == "GET":
                self.server.asked.append(name)
            self.answer(
                files[name], "application/octet-stream", ETag=f'"{sha1(files[name]).hexdigest()}"', X_Repo_Commit=COMMIT
            )
        elif "/tree/" in path:
            tree = []
            for name, content in files.items():
                tree.append({"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()})
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/user/name"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "user/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if path.endswith("/preupload/main"):
            asked = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
            self.answer(json.dumps({"files": asked}).encode())
        elif path.endswith("/commit/main"):
            for line in body.splitlines():
                each = json.loads(line)
                if each["key"] == "file":
                    self.server.files[each["value"]["path"]] = base64.b64decode(each["value"]["content"])
            self.answer(json.dumps({"commitUrl": f"{self.server.url}/user/name", "commitOid": COMMIT}).encode())
        else:  # /api/repos/create, /api/validate-yaml
            found = {"url": f"{self.server.url}/user/name", "name": "user/name", "errors": [], "warnings": []}
            self.answer(json.dumps(found).encode())


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
