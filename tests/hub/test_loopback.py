"""The loopback Hub answers the real client as the Hub does, and its faults are what the client takes them for."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import loopback
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    file_download,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support import HTTPX


ID = "user/x"
FILES = {
    "README.md": b"---\nbase_model: user/base\n---\nA card.\n",
    "deep/er/a.txt": b"a" * 40,
    "w.bin": bytes(range(99)),
}


@pytest.fixture
def hub(monkeypatch) -> Iterator[loopback.Hub]:
    """A Hub with an empty repository, where *.bin are LFS files."""
    with loopback.running_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        hub.lfs_names = {"*.bin"}
        hub.repositories[ID] = {}
        yield hub


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that the client would wait before it tries again; it does not."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_right")


def push(api: HfApi, files: dict[str, bytes], **options) -> str:
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(ID, operations, commit_message="m", **options).oid


def download(hub, name: str, folder: Path, **options) -> bytes:
    options = {"cache_dir": folder, "token": False, **options}
    return Path(hf_hub_download(ID, name, endpoint=hub.url, **options)).read_bytes()


def came(hub, part: str) -> list[str]:
    return [request for request in hub.requests if part in request]


def test_what_is_pushed_is_downloaded(hub, api, tmp_path) -> None:
    assert api.create_repo("user/new", private=True) == f"{hub.url}/user/new" and hub.private == {"user/new"}
    assert api.create_repo("user/new", exist_ok=True).repo_id == "user/new"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("user/new")
    assert push(api, FILES) == hub.commit_of(ID)
    assert hub.repositories[ID] == hub.files(ID) == FILES
    assert list(hub.lfs_objects.values()) == [FILES["w.bin"]]
    for name, data in FILES.items():
        assert download(hub, name, tmp_path) == data
    folder = Path(snapshot_download(ID, endpoint=hub.url, cache_dir=tmp_path / "snapshot", token=False))
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == FILES
    tokens = dict(zip(hub.requests, hub.authorizations, strict=True))
    assert tokens[f"POST /api/models/{ID}/commit/main"] == "Bearer hf_right"
    assert [tokens[request] for request in came(hub, "PUT ")] == [None]
    assert api.whoami()["name"] == "user"


def test_what_is_there_is_not_pushed_again(hub, api, tmp_path) -> None:
    commit = push(api, FILES)
    before = len(came(hub, "/commit/")), len(came(hub, "PUT "))
    assert push(api, FILES) == commit
    assert (len(came(hub, "/commit/")), len(came(hub, "PUT "))) == before
    (tmp_path / "copy.bin").write_bytes(FILES["w.bin"])  # an object that is there under another name
    (tmp_path / "new.bin").write_bytes(b"new")
    api.upload_folder(repo_id=ID, folder_path=tmp_path, path_in_repo="sub")
    assert len(came(hub, "PUT ")) == before[1] + 1
    assert hub.files(ID) == FILES | {"sub/copy.bin": FILES["w.bin"], "sub/new.bin": b"new"}
    operations = [CommitOperationDelete("sub/"), CommitOperationDelete("w.bin")]
    api.create_commit(ID, operations, commit_message="m")
    assert set(hub.repositories[ID]) == {"README.md", "deep/er/a.txt"}
    with pytest.raises(EntryNotFoundError):
        api.create_commit(ID, operations, commit_message="m")


def test_revisions(hub, api, tmp_path) -> None:
    first = push(api, {"a.txt": b"1"})
    api.create_branch(ID, branch="try/this")
    second = push(api, {"a.txt": b"2"}, parent_commit=first)
    third = push(api, {"a.txt": b"3"}, revision="try/this")
    assert hub.branches(ID) == {"main": second, "try/this": third}
    with pytest.raises(HfHubHTTPError, match="412"):
        push(api, {"a.txt": b"4"}, parent_commit=first)
    for revision, data in {first: b"1", "main": b"2", "try/this": b"3"}.items():
        assert download(hub, "a.txt", tmp_path, revision=revision) == data == hub.files(ID, revision)["a.txt"]
        assert api.repo_info(ID, revision=revision).sha == hub.commit_of(ID, revision)
    hub.repositories[ID]["a.txt"] = b"5"  # by somebody else
    assert hub.commit_of(ID) not in (first, second, third)
    with pytest.raises(HfHubHTTPError, match="412"):
        push(api, {"a.txt": b"4"}, parent_commit=second)
    assert hub.files(ID, second) == {"a.txt": b"2"}
    hub.repositories = {ID: {"b.txt": b""}}
    assert (
        download(hub, "b.txt", tmp_path) == b"" and download(hub, "a.txt", tmp_path / "again", revision=first) == b"1"
    )
    api.create_branch(ID, branch="old", revision=first)
    api.create_branch(ID, branch="old", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(ID, branch="old")
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(ID, branch="older", revision="none")
    with pytest.raises(RevisionNotFoundError):
        push(api, {"a.txt": b"4"}, revision="none")
    with pytest.raises(EntryNotFoundError):
        download(hub, "none.txt", tmp_path)


def test_files_are_listed_as_git_and_lfs_name_them(hub, api) -> None:
    push(api, FILES)
    sha256 = hashlib.sha256(FILES["w.bin"]).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 99\n".encode()
    blobs = FILES | {"w.bin": pointer}
    expected = {name: hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest() for name, blob in blobs.items()}
    tree = {entry.path: entry for entry in api.list_repo_tree(ID, recursive=True)}
    assert set(tree) == {*FILES, "deep", "deep/er"}
    infos = {entry.path: entry for entry in api.get_paths_info(ID, [*FILES, "none"])}
    siblings = {entry.rfilename: entry for entry in api.repo_info(ID, files_metadata=True).siblings}
    for listed in ({name: tree[name] for name in FILES}, infos, siblings):
        assert {name: entry.blob_id for name, entry in listed.items()} == expected
        assert listed["w.bin"].lfs.sha256 == sha256 and listed["README.md"].lfs is None
    assert {entry.path for entry in api.list_repo_tree(ID)} == {"README.md", "deep", "w.bin"}
    assert {entry.path for entry in api.list_repo_tree(ID, "deep/er")} == {"deep/er/a.txt"}


def test_an_object_that_was_not_uploaded_is_not_committed(hub, api) -> None:
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("w.bin", b"w")]
    api.preupload_lfs_files(ID, operations)
    hub.lfs_objects.clear()
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit(ID, operations, commit_message="m")
    assert hub.repositories[ID] == {}


@pytest.mark.parametrize("metadata", ["base_model: /home/me/base", "datasets: [user/d, ./d]", "a: [", "- a"])
def test_a_wrong_card_is_refused(hub, api, metadata: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push(api, {"README.md": f"---\n{metadata}\n---\n".encode()})
    assert not came(hub, "/commit/")


def test_who_may_do_what(hub, api, tmp_path) -> None:
    push(api, FILES)
    hub.tokens, hub.private = {"hf_right"}, {ID}
    anonymous, wrong = HfApi(endpoint=hub.url, token=False), HfApi(endpoint=hub.url, token="hf_wrong")
    for ask in (anonymous.repo_info, anonymous.list_repo_files, lambda _: download(hub, "w.bin", tmp_path)):
        with pytest.raises(RepositoryNotFoundError, match="401"):
            ask(ID)
    assert download(hub, "w.bin", tmp_path, token="hf_right") == FILES["w.bin"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    hub.private.clear()
    assert download(hub, "README.md", tmp_path) == FILES["README.md"]
    for other in (anonymous, wrong):
        for write in (lambda by: push(by, {"a": b""}), lambda by: by.create_repo("user/new")):
            with pytest.raises(HfHubHTTPError, match="401"):
                write(other)
    hub.forbidden_namespaces = {"user"}
    with pytest.raises(HfHubHTTPError, match="403"):
        push(api, {"a": b""})
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("user/new")
    assert hub.repositories == {ID: FILES}
    with pytest.raises(RepositoryNotFoundError, match="404"):
        api.repo_info("user/none")


@pytest.mark.parametrize("fault", [503, (429, {"Retry-After": "1"}), "drop", "drop after"])
@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "PUT /", "/objects/verify"])
def test_an_upload_is_tried_again(hub, api, waits, part: str, fault) -> None:
    hub.faults = {part: [fault, fault]}
    push(api, {"w.bin": bytes(2_000_000)})
    assert hub.repositories[ID] == {"w.bin": bytes(2_000_000)} and hub.faults == {part: []}
    assert waits == ([2, 2] if isinstance(fault, tuple) else [1, 2])  # the client adds one to what it is told
    assert len(came(hub, part)) == 3


@pytest.mark.parametrize("fault", ["drop", "drop after"])
def test_a_commit_whose_answer_is_lost(hub, api, fault: str) -> None:
    hub.faults = {"/commit/": [fault]}
    with pytest.raises(HTTPX.TransportError):
        push(api, {"a.txt": b"a"})
    assert hub.repositories[ID] == ({"a.txt": b"a"} if fault == "drop after" else {})
    assert len(came(hub, "/commit/")) == 1


def test_a_download_that_breaks_off_is_resumed(hub, waits, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10)  # what the client keeps is whole chunks
    starts, original = [], file_download._adjust_range_header
    monkeypatch.setattr(file_download, "_adjust_range_header", lambda *a: starts.append(a[1]) or original(*a))
    hub.repositories[ID]["w.bin"] = data = bytes(range(100))
    hub.faults = {f"GET /{ID}/resolve": ["drop", 429], "/resolve/": ["cut", "cut"]}
    assert download(hub, "w.bin", tmp_path) == data
    assert hub.faults == {f"GET /{ID}/resolve": [], "/resolve/": []} and len(came(hub, "GET /user")) == 5
    assert starts == [50, 70]
    [head] = came(hub, "HEAD /user")
    ranged = HTTPX.get(hub.url + head.removeprefix("HEAD "), headers={"Range": "bytes=90-"})
    assert (ranged.status_code, ranged.content, ranged.headers["Content-Range"]) == (206, data[90:], "bytes 90-99/100")


def test_a_short_download_is_refused(hub, tmp_path) -> None:
    hub.repositories[ID]["a.txt"] = b"a" * 100
    hub.faults = {"/resolve/": ["short"]}
    with pytest.raises(OSError, match="should be of size 100 but has size 50"):
        download(hub, "a.txt", tmp_path)
    assert download(hub, "a.txt", tmp_path) == b"a" * 100
