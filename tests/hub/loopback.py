"""A Hub on the loopback interface, for tests of whole pushes and downloads by the real client.

It speaks the routes of the Hugging Face Hub that huggingface_hub uses for models, and keeps all in memory. The client
finds it by HF_ENDPOINT or `endpoint=hub.url`; HF_HUB_DISABLE_XET=1 must be set, as Xet's protocol is not spoken here.
"""

import hashlib
import json
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub.repositories import Hub, Refusal, read_card


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A [`Hub`] that answers at its `url` while this lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Answer(NamedTuple):
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = {}


ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []
ID = r"((?:[\w.-]+/)?[\w.-]+)"
MODEL = rf"/api/models/{ID}"


def route(method: str, pattern: str) -> Callable:
    """Has a method of the handler answer the paths of a pattern, with the unquoted groups as its arguments."""

    def add(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte, after which a connection is closed: no thread waits for ever
    disable_nagle_algorithm = True  # a header and a body are two writes, and the second would wait for 40 ms
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that went away
            super().handle()

    def do_GET(self) -> None:
        """Any request: notes it and lets a fault befall it, or answers it by the first route that fits."""
        self.fault = self.hub.note(self.command, self.path, self.headers.get("Authorization"))
        length = int(self.headers.get("Content-Length", 0))
        if self.fault == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)  # always: the next request follows on the same connection
        if isinstance(self.fault, int | tuple):
            status, headers = self.fault if isinstance(self.fault, tuple) else (self.fault, {})
            return self._send(Answer({"error": "as the test wants"}, status, headers))
        try:
            with self.hub.lock:
                answer = self._route()
        except Refusal as refusal:
            answer = Answer({"error": str(refusal)}, refusal.status, refusal.headers)
        except Exception:  # a mistake here, said by a status that the client does not try again
            answer = Answer({"error": traceback.format_exc()}, 501)
        self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> Answer:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self.token = token if scheme.lower() == "bearer" else None
        if self.token is not None and self.hub.tokens and self.token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        for method, pattern, function in ROUTES:
            found = pattern.fullmatch(path)
            if found and method == self.command.replace("HEAD", "GET"):
                return function(self, *(group and unquote(group) for group in found.groups()))
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _send(self, answer: Answer) -> None:
        if self.fault == "drop after":
            self.close_connection = True
            return
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        sent = data[: len(data) // 2] if self.fault in ("cut", "short") else data
        self.send_response(answer.status)
        length = len(sent if self.fault == "short" else data)
        for name, value in {"Content-Length": str(length), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if self.fault == "cut":
            self.close_connection = True

    @route("GET", "/api/whoami-v2")
    def _whoami(self) -> Answer:
        if self.hub.tokens and self.token is None:
            raise Refusal(401, "Invalid username or password.")
        return Answer({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": []})

    @route("POST", "/api/repos/create")
    def _create(self) -> Answer:
        wanted = json.loads(self.body)
        repository = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        self.hub.check_write(repository, self.token)
        url = {"url": f"{self.hub.url}/{repository}"}
        if repository in self.hub.repositories:
            return Answer(url | {"error": "You already created this model repo"}, 409)
        self.hub.create(repository, wanted.get("private", False) or wanted.get("visibility") == "private")
        return Answer(url)

    @route("POST", "/api/validate-yaml")
    def _validate_card(self) -> Answer:
        try:
            read_card(json.loads(self.body)["content"])
        except (ValueError, yaml.YAMLError) as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return Answer({"errors": [], "warnings": []})

    @route("POST", MODEL + "/branch/([^/]+)")
    def _create_branch(self, repository: str, branch: str) -> Answer:
        self._check(repository, write=True)
        self.hub.create_branch(repository, branch, json.loads(self.body or "{}").get("startingPoint", "main"))
        return Answer()

    @route("POST", MODEL + "/preupload/([^/]+)")
    def _preupload(self, repository: str, revision: str) -> Answer:
        """How each file is to be sent, and what is there under its name: the client leaves out what is the same."""
        self._check(repository, write=True)
        present = {entry["path"]: entry for entry in self.hub.tree(repository, revision)}
        files = []
        for file in json.loads(self.body)["files"]:
            entry = present.get(file["path"], {"oid": None})
            mode = "lfs" if self.hub.is_lfs(file["path"], file["size"]) else "regular"
            oid = entry.get("lfs", entry)["oid"]
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer({"files": files})

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, repository: str) -> Answer:
        self._check(repository, write=True)
        verify = {"href": f"{self.hub.url}/{repository}.git/info/lfs/objects/verify", "header": {}}
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{repository}/{wanted['oid']}", "header": {}}
            new = {} if wanted["oid"] in self.hub.lfs_objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **new})
        return Answer({"transfer": "basic", "objects": objects})

    @route("PUT", rf"/lfs/{ID}/([0-9a-f]{{64}})")
    def _lfs_upload(self, repository: str, oid: str) -> Answer:
        """Asks for no token, as the client sends none here: the Hub's own address of an upload is a signed one."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its SHA-256")
        self.hub.lfs_objects[oid] = self.body
        return Answer()

    @route("POST", rf"/{ID}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, repository: str) -> Answer:
        self._check(repository, write=True)
        wanted = json.loads(self.body)
        if len(self.hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "The object was not uploaded")
        return Answer()

    @route("POST", MODEL + "/commit/([^/]+)")
    def _commit(self, repository: str, branch: str) -> Answer:
        self._check(repository, write=True)
        header, *entries = (json.loads(line) for line in self.body.splitlines())
        commit = self.hub.commit(repository, branch, entries, header["value"].get("parentCommit"))
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        return Answer({"success": True, "commitOid": commit, "commitUrl": url})

    @route("GET", MODEL + "(?:/revision/([^/]+))?")
    def _info(self, repository: str, revision: str | None) -> Answer:
        self._check(repository)
        commit = self.hub.commit_of(repository, revision or "main")
        card = {}
        with suppress(ValueError, yaml.YAMLError):
            card = read_card(self.hub.files(repository, commit).get("README.md", b"").decode())
        siblings = []
        for entry in self.hub.tree(repository, commit):
            if entry["type"] == "file":
                siblings.append({"rfilename": entry["path"]})
                if "blobs" in self.query:
                    siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"]}
                    if lfs := entry.get("lfs"):
                        siblings[-1]["lfs"] = lfs | {"sha256": lfs["oid"]}
        info = {"id": repository, "modelId": repository, "author": repository.partition("/")[0], "sha": commit}
        info |= {"private": repository in self.hub.private, "gated": False, "disabled": False}
        return Answer(info | {"siblings": siblings, "cardData": card, "tags": card.get("tags") or []})

    @route("GET", MODEL + "/tree/([^/]+)(?:/(.+))?")
    def _tree(self, repository: str, revision: str, folder: str | None) -> Answer:
        self._check(repository)
        start = folder.rstrip("/") + "/" if folder else ""
        entries = [entry for entry in self.hub.tree(repository, revision) if entry["path"].startswith(start)]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(start)]
        return Answer(entries)

    @route("POST", MODEL + "/paths-info/([^/]+)")
    def _paths_info(self, repository: str, revision: str) -> Answer:
        self._check(repository)
        paths = parse_qs(self.body.decode()).get("paths", [])
        return Answer([entry for entry in self.hub.tree(repository, revision) if entry["path"] in paths])

    @route("GET", f"/{ID}/resolve/([^/]+)/(.+)")
    def _resolve(self, repository: str, revision: str, name: str) -> Answer:
        """A file, or the part of it that a download which broke off lacks."""
        self._check(repository)
        commit = self.hub.commit_of(repository, revision)
        data = self.hub.files(repository, commit).get(name)
        if data is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        entry = self.hub.entry(name, data)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or self.fault == "short":
            return Answer(data, 200, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if start > end:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Answer(data[start : end + 1], 206, headers)

    @route("GET", "/api/collections/(.+)")
    def _collection(self, slug: str) -> Answer:
        if slug not in self.hub.collections:
            raise Refusal(404, "Collection not found")
        items = [
            {"_id": f"{index:024x}", "id": repository, "type": "model", "position": index}
            for index, repository in enumerate(self.hub.collections[slug])
        ]
        collection = {"slug": slug, "title": slug, "owner": {"name": slug.partition("/")[0]}, "items": items}
        collection |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "private": False, "theme": "blue"}
        return Answer(collection | {"upvotes": 0, "position": 0})

    def _check(self, repository: str, write: bool = False) -> None:
        """Refuses the request of who may not do this, or where there is no such repository."""
        if write:
            self.hub.check_write(repository, self.token)
        self.hub.check_read(repository, self.token)
