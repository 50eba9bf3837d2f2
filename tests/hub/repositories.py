"""What a Hub holds: repositories with branches and commits, who may read and write, what is to go wrong. No HTTP."""

import base64
import fnmatch
import hashlib
import re
import threading
from collections.abc import Iterable

import yaml


Files = dict[str, bytes]
Fault = int | tuple[int, dict[str, str]] | str


class Refusal(Exception):
    """A status that is answered in place of what was asked, with the Hub's own code for why, if it has one."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Hub:
    """Repositories with branches and commits, and what came in.

    `repositories` has the files of the main branches. A test may change or replace them at will, which counts as a
    commit by somebody else. `faults` has, for a part of "METHOD path", what befalls the next requests with that part,
    one entry each: {"/commit/": [503, (429, {"Retry-After": "1"}), "drop after"], "PUT /": ["drop"]}.

    - a status, or a status with headers, is answered, and nothing is done;
    - "drop" closes the connection with half of the request read;
    - "drop after" does what is asked and closes the connection without an answer;
    - "cut" announces a whole file, sends half of it and closes the connection;
    - "short" sends half of a file as if it were all. These two wait for a GET of a file, and let its HEAD pass.
    """

    def __init__(self) -> None:
        self.url = ""
        self.user = "user"  # whose tokens these are
        self.lock = threading.RLock()  # requests come in several threads
        self.repositories: dict[str, Files] = {}
        self.collections: dict[str, list[str]] = {}
        self.private: set[str] = set()
        self.tokens: set[str] = set()  # with none, everybody may do everything
        self.forbidden_namespaces: set[str] = set()  # where nobody may write
        self.lfs_objects: dict[str, bytes] = {}  # by their SHA-256
        self.lfs_above_bytes = 10_000_000
        self.lfs_names: set[str] = set()  # patterns such as "*.safetensors"
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []  # the header of each request
        self._commits: dict[str, dict[str, Files]] = {}  # repository -> hash -> files
        self._branches: dict[str, dict[str, str]] = {}  # repository -> name -> hash

    def branches(self, repository: str) -> dict[str, str]:
        """The commit that each branch is at."""
        with self.lock:
            branches = self._branches.setdefault(repository, {})
            files = self.repositories[repository]
            if "main" not in branches or self._commits[repository][branches["main"]] != files:
                self._add_commit(repository, "main", dict(files))
            return dict(branches)

    def commit_of(self, repository: str, revision: str = "main") -> str:
        """The hash of the commit that a revision, a branch or a hash, is."""
        with self.lock:
            commit = self.branches(repository).get(revision, revision)
            if commit not in self._commits[repository]:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return commit

    def files(self, repository: str, revision: str = "main") -> Files:
        """The files of a revision."""
        with self.lock:
            commit = self.commit_of(repository, revision)
            return dict(self._commits[repository][commit])

    def create(self, repository: str, private: bool = False) -> None:
        """A new repository; one of that name before, which a test took away, leaves no history."""
        with self.lock:
            self.repositories[repository] = {}
            self._commits.pop(repository, None)
            self._branches.pop(repository, None)
            (self.private.add if private else self.private.discard)(repository)

    def create_branch(self, repository: str, branch: str, start: str = "main") -> None:
        with self.lock:
            if branch in self.branches(repository):
                raise Refusal(409, f"Reference refs/heads/{branch} already exists")
            self._branches[repository][branch] = self.commit_of(repository, start)

    def commit(self, repository: str, branch: str, entries: Iterable[dict], parent: str | None = None) -> str:
        """A commit of what the lines of a commit request say: all of them or, where one cannot be, none."""
        with self.lock:
            if branch not in self.branches(repository):
                raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if parent not in (None, self.commit_of(repository, branch)):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = self.files(repository, branch)
            for entry in entries:
                self._apply(files, entry["key"], entry["value"])
            if branch == "main":
                self.repositories[repository].clear()  # changed in place: a test may hold it
                self.repositories[repository].update(files)
            return self._add_commit(repository, branch, files)

    def _apply(self, files: Files, key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.lfs_objects:
                raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = self.lfs_objects[value["oid"]]
        else:
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(folder))]
            if not gone:
                raise Refusal(404, f"{path} does not exist", "EntryNotFound")
            for name in gone:
                del files[name]

    def _add_commit(self, repository: str, branch: str, files: Files) -> str:
        # With the parent in its hash, a commit that changes nothing is another one, as in git.
        branches = self._branches[repository]
        content = [repository, branches.get(branch), *((name, git_oid(files[name])) for name in sorted(files))]
        branches[branch] = hashlib.sha1(repr(content).encode()).hexdigest()
        self._commits.setdefault(repository, {})[branches[branch]] = files
        return branches[branch]

    def is_lfs(self, name: str, size: int) -> bool:
        """Whether files of this name and size are kept as LFS objects: no empty ones, which the client never sends."""
        by_name = any(fnmatch.fnmatch(name, pattern) for pattern in self.lfs_names)
        return size > 0 and (by_name or size > self.lfs_above_bytes)

    def entry(self, name: str, data: bytes) -> dict:
        """A file as the Hub lists it. In git an LFS file is its pointer, so its oid is that of the pointer."""
        entry = {"type": "file", "path": name, "size": len(data)}
        if not self.is_lfs(name, len(data)):
            return entry | {"oid": git_oid(data)}
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        lfs = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
        return entry | {"oid": git_oid(pointer), "lfs": lfs}

    def tree(self, repository: str, revision: str) -> list[dict]:
        """All files and folders of a revision. The oid of a folder only changes with its files; it is not git's."""
        files = self.files(repository, revision)
        entries = [self.entry(name, data) for name, data in files.items()]
        parts = (name.split("/") for name in files)
        for folder in {"/".join(part[:depth]) for part in parts for depth in range(1, len(part))}:
            inside = sorted((name, git_oid(files[name])) for name in files if name.startswith(folder + "/"))
            entries.append({"type": "directory", "path": folder, "size": 0, "oid": git_oid(repr(inside).encode())})
        return sorted(entries, key=lambda entry: entry["path"])

    def check_read(self, repository: str, token: str | None) -> None:
        """Refuses who may not know of a repository just as if there were none."""
        known = not self.tokens or token in self.tokens
        if repository not in self.repositories or (repository in self.private and not known):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")

    def check_write(self, repository: str, token: str | None) -> None:
        if self.tokens and token not in self.tokens:
            raise Refusal(401, "Invalid username or password.")
        if (namespace := repository.partition("/")[0]) in self.forbidden_namespaces:
            raise Refusal(403, f"You don't have the rights to write in the namespace {namespace}")

    def note(self, method: str, path: str, authorization: str | None) -> Fault | None:
        """Keeps that a request came and gives the fault that a test has laid for it."""
        request = f"{method} {path}"
        with self.lock:
            self.requests.append(request)
            self.authorizations.append(authorization)
            for part, faults in self.faults.items():
                if part in request and faults:
                    if faults[0] not in ("cut", "short") or (method == "GET" and "/resolve/" in path):
                        return faults.pop(0)
        return None


def git_oid(data: bytes) -> str:
    """The name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_card(content: str) -> dict:
    """The metadata at the top of a model card. Raises ValueError or yaml.YAMLError where they are wrong."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", content, re.DOTALL | re.MULTILINE)
    metadata = (yaml.safe_load(found[1]) if found else None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("The metadata are not a mapping")
    for key in ("base_model", "datasets"):
        values = metadata.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if str(value).startswith(("/", ".")):
                raise ValueError(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co.')
    return metadata
