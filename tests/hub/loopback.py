"""The Hub's routes that uploading and downloading a small file use, on the loopback interface, keeping files in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories by id, each a dictionary of file name -> bytes; collections of their ids; the requests that came.

    `faults` has statuses that the next requests of a path are answered with: {"/resolve/": [503, 503]}.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.collections: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.faults: dict[str, list[int]] = {}
        self.url = ""

    def commit_of(self, repository: str) -> str:
        """A hash that changes with the files."""
        return hashlib.sha1(repr(sorted(self.repositories[repository].items())).encode()).hexdigest()


@contextmanager
def running_hub():
    """A [`Hub`] that answers at its `url` while this lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._fault():
            return
        if self.path.startswith("/api/collections/"):
            return self._answer_collection(self.path.removeprefix("/api/collections/"))
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
        if not found:
            return self._answer(404, {})
        repository, _, name = found.groups()
        files = self.hub.repositories.get(repository)
        if files is None or name not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self._answer(404, {}, {"X-Error-Code": code})
        etag = hashlib.sha1(files[name]).hexdigest()
        self._answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit_of(repository)})

    def _answer_collection(self, slug: str) -> None:
        if slug not in self.hub.collections:
            return self._answer(404, {})
        date = "2026-01-01T00:00:00.000Z"
        items = [
            {"_id": f"{index:024x}", "id": repository, "type": "model", "position": index}
            for index, repository in enumerate(self.hub.collections[slug])
        ]
        owner = {"name": slug.partition("/")[0]}
        self._answer(
            200,
            {"slug": slug, "title": slug, "owner": owner, "items": items, "lastUpdated": date, "private": False,
             "theme": "blue", "upvotes": 0, "position": 0},
        )  # fmt: skip

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._fault():
            return
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repository = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.hub.repositories.setdefault(repository, {})
            return self._answer(200, {"url": f"{self.hub.url}/{repository}"})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/([^/]+)", self.path)
        if not found:
            return self._answer(404, {})
        repository, action, _ = found.groups()
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._answer(200, {"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.commit_of(repository)
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _fault(self) -> bool:
        self.hub.requests.append(f"{self.command} {self.path}")
        for path, statuses in self.hub.faults.items():
            if path in self.path and statuses:
                self._answer(statuses.pop(0), {"error": "as the test wants"})
                return True
        return False

    def _answer(self, status: int, body: bytes | dict, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
