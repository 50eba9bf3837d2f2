"""An adapter's folder -> a repository on the Hub, as one commit of the files named here and nothing else; and back.

`PeftModel.push_to_hub` and the trainers' own pushes upload what lies in the folder (a pickled training_args.bin, tokenizers
nobody changed, paths of this machine) and replace the card. Here a push reads the folder and changes nothing in it, so that
it can be repeated; what the Hub holds already is not sent again. Files of an earlier push that are not in this one are
removed in the same commit: a tokenizer left behind would be loaded.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import card
from .adapter_files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    explained,
    find_adapter,
    first_line,
    reason_of,
)
from .describe import Description, describe
from .errors import AdapterFileError, ConfigError, HubError


logger = logging.getLogger(__name__)

T = TypeVar("T")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
REPORT_FILES = (
    "README.md",
    "recipe.yaml",  # what the recipe was set to
    "reward_curve.csv",
    "reward_curve.png",
    "loss_curve.csv",
    "loss_curve.png",
    ".eval_results/*.yaml",
)
FILES = (*ADAPTER_FILES, *REPORT_FILES, *TOKENIZER_FILES)
TEXTS = (".md", ".yaml", ".json", ".csv", ".jinja", ".txt")
A_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
WAITS_SECONDS = (1, 2, 4, 8)  # before trying again, where the Hub does not say for how long
LONGEST_WAIT_SECONDS = 300
PASSING = (409, 412, 429)  # a commit of somebody else in the meantime, or too many requests


class Overtaken(HubError):
    """A commit holds other files than those that were pushed: where nothing had to be sent, somebody else's came since."""


class Pushed(NamedTuple):
    """A push that succeeded.

    Args:
        repository (`str`): its full id.
        commit (`str`): 40 hex digits.
        url (`str`): of the commit.
        files (`list[str]`): what the commit consists of, sorted.
    """

    repository: str
    commit: str
    url: str
    files: list[str]


def push(
    folder: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    base: str | None = None,
) -> Pushed:
    """Upload an adapter as one commit.

    Of the folder go: the two files of the adapter, its card, recipe.yaml, evaluation results and curve, and the tokenizer
    where it is not that of the base model. Where the folder has no card, one is made. Server errors, lost connections and
    commits of others in the meantime are tried again.

    Args:
        folder (`str` or `Path`): of the adapter. Not changed.
        repository (`str`): id on the Hub; made if there is none.
        revision (`str`, *optional*): branch to commit to, made if there is none. Defaults to main.
        private (`bool`, *optional*): of a repository that is made here.
        token (`str`, *optional*): defaults to the one that is stored.
        base (`str`, *optional*): Hub id of the base model, where the adapter's config names a folder.

    Raises:
        AdapterFileError, ConfigError: if the folder holds no sound adapter, or what must not be published; before anything
            is sent.
        HubError: if the Hub refuses or stays unreachable; says how to push again.
    """
    folder = Path(folder)
    files = files_to_push(folder, repository, base)
    refuse_tokens(files, token)
    api = HfApi(library_name="peft_tinylora", token=token)
    try:
        return tried_again(lambda: _commit(api, files, repository, revision, private))
    except ConfigError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        again = f"peft-tinylora push {folder} {repository}"
        again += "".join(f" --{name} {value}" for name, value in (("revision", revision), ("base", base)) if value)
        raise HubError(
            f"{repository}: {reason_of(error, revision)} Nothing in {folder} was changed; to push it again: "
            f"{again}{' --private' if private else ''}"
        ) from error


def check_access(repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """The full id of a repository that can be pushed to, which is made if there is none; for before a long training.

    Raises:
        HubError: if the token may not, or the Hub cannot be reached.
    """
    api = HfApi(library_name="peft_tinylora", token=token)
    with explained(repository):
        return tried_again(lambda: api.create_repo(repository, private=private, exist_ok=True)).repo_id


def pull(
    repository: str, folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> tuple[Description, list[str]]:
    """Download an adapter into a folder: the files that [`push`] uploads, those that there are, and no others.

    Args:
        repository (`str`): id on the Hub.
        folder (`str` or `Path`): must not hold an adapter yet; all of it is written or nothing.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str`, *optional*): defaults to the one that is stored.

    Returns:
        [`Description`] and `list[str]`: what was downloaded, once it was checked, and the names of the files.

    Raises:
        AdapterFileError, ConfigError: if the folder holds an adapter, or the repository no sound one.
        HubError: if the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        raise AdapterFileError(f"{folder} holds an adapter already: name another folder, or remove it first.")
    api = HfApi(library_name="peft_tinylora", token=token)
    with explained(repository, revision):
        info = tried_again(lambda: api.repo_info(repository, revision=revision))
        names = sorted(sibling.rfilename for sibling in info.siblings or [] if is_of_adapter(sibling.rfilename))
    partial = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        found = find_adapter(repository, info.sha, token=token)
        description = describe(found)
        for name in names:
            with explained(repository, revision):
                path = hf_hub_download(repository, name, revision=info.sha, token=token, library_name="peft_tinylora")
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        folder.mkdir(parents=True, exist_ok=True)
        # The config last: with it, the folder is an adapter.
        for name in sorted(names, key=lambda name: name == CONFIG_FILE):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description, names


def is_of_adapter(name: str) -> bool:
    """Whether a file of a repository is one that [`push`] uploads."""
    return ".." not in name and any(fnmatch(name, pattern) for pattern in FILES)


def files_to_push(folder: Path, repository: str, base: str | None) -> dict[str, bytes | Path]:
    """What a push of a folder consists of: name in the repository -> content.

    Raises:
        AdapterFileError, ConfigError: as [`push`].
    """
    adapter = describe(find_adapter(folder))
    base = public_base(adapter, folder, base)
    adapter.config.base_model_name_or_path = base
    config = json.loads((folder / CONFIG_FILE).read_bytes()) | {"base_model_name_or_path": base}
    files: dict[str, bytes | Path] = {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True)).encode(),
        WEIGHTS_FILE: folder / WEIGHTS_FILE,
        "README.md": card_to_push(adapter, folder, repository, base).encode(),
    }
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*"))]
    skipped = {*files, *(TOKENIZER_FILES if not has_own_tokenizer(folder, base) else ())}
    files |= {name: folder / name for name in names if is_of_adapter(name) and name not in skipped}
    return files


def public_base(adapter: Description, folder: Path, base: str | None) -> str:
    """The Hub id of the base model that a pushed adapter names; raises [`ConfigError`] where there is none."""
    named = base or adapter.config.base_model_name_or_path
    problem = None
    if named is None:
        problem = "does not name its base model"
    elif Path(named).exists() or named.count("/") > 1 or named.startswith((".", "/", "~")):
        problem = f"names a folder of this machine as its base model ({named})"
    if problem:
        raise ConfigError(f"{folder} {problem}, which nobody else has: name its id on the Hub by --base user/name.")
    return named


def card_to_push(adapter: Description, folder: Path, repository: str, base: str) -> str:
    """The folder's card for its repository; one made from the adapter's files where it has none but an empty form.

    Raises:
        ConfigError: if the metadata of the card cannot be read.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.strip() or card.is_nobodys(text):
        return str(card.make_card(adapter, repository))
    try:
        readme = ModelCard(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"the metadata in {path} cannot be read ({first_line(error)}): mend or remove it."
        ) from error
    if not card.is_made_here(text):
        return text
    if readme.data.base_model is None:
        readme.data.base_model, readme.data.base_model_relation = base, "adapter"
        readme.data.tags = [f"base_model:adapter:{base}", *readme.data.tags]
    return card.with_place(str(readme), repository)


def has_own_tokenizer(folder: Path, base: str) -> bool:
    """Whether a folder has a tokenizer that is not that of the base model, or that cannot be compared with it."""
    if not (folder / "tokenizer_config.json").exists():
        return False
    try:
        own, of_base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        logger.warning("the tokenizer in %s is pushed too: it cannot be compared (%s).", folder, first_line(error))
        return True
    return is_changed(own, of_base)


def is_changed(tokenizer: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives other tokens, prompts or ends than another; what it pads with does not matter."""

    def behaviour(tokenizer: PreTrainedTokenizerBase) -> tuple:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = None
        if backend is not None:
            rules = {
                name: value
                for name, value in json.loads(backend.to_str()).items()
                if name not in ("padding", "truncation")
            }
        return tokenizer.get_vocab(), tokenizer.chat_template, special, rules

    return behaviour(tokenizer) != behaviour(of_base)


def refuse_tokens(files: Mapping[str, bytes | Path], token: str | None) -> None:
    """Raise a [`ConfigError`] where a text that is about to be published holds a token of the Hub."""
    secrets = {secret for secret in (token, get_token()) if secret}
    for name, content in files.items():
        if not name.endswith(TEXTS):
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")
        if any(secret in text for secret in secrets) or A_TOKEN.search(text):
            raise ConfigError(f"{name} holds a token of the Hub: remove it there. Nothing was pushed.")


def tried_again(call: Callable[[], T]) -> T:
    """What `call` returns; called again after server errors, lost connections and commits of others in between."""
    for wait in WAITS_SECONDS:
        try:
            return call()
        except (HTTPError, Overtaken) as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            status = None if response is None else response.status_code
            if status is not None and status < 500 and status not in PASSING:
                raise
            asked = "" if response is None else response.headers.get("Retry-After", "")
            seconds = min(int(asked), LONGEST_WAIT_SECONDS) if asked.isdigit() else wait
            said = str(error) if isinstance(error, Overtaken) else f"no answer from the Hub ({type(error).__name__})"
            logger.warning("%s: again in %d s.", said if response is None else f"the Hub answered {status}", seconds)
            time.sleep(seconds)
    return call()


def _commit(
    api: HfApi, files: Mapping[str, bytes | Path], repository: str, revision: str | None, private: bool | None
) -> Pushed:
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    before = api.repo_info(repository, revision=revision)
    there = {sibling.rfilename for sibling in before.siblings or []}
    if "config.json" in there and CONFIG_FILE not in there:
        raise ConfigError(f"{repository} holds a model (config.json) and no adapter: push to another name.")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(there - files.keys()) if is_of_adapter(name)]
    done = api.create_commit(
        repository,
        operations,
        commit_message="Upload adapter with peft_tinylora",
        revision=revision,
        parent_commit=before.sha,  # or the file that somebody pushes meanwhile would be lost, or left
    )
    wrong = _different(api, files, repository, done.oid)
    if wrong:
        raise Overtaken(f"the Hub does not give {wrong[0]} back as it was pushed.")
    return Pushed(repository, done.oid, done.commit_url, sorted(files))


def _different(api: HfApi, files: Mapping[str, bytes | Path], repository: str, commit: str) -> list[str]:
    """The files of a commit that are not on the Hub as they were sent, by the hashes that it keeps."""
    found = {info.path: info for info in api.get_paths_info(repository, list(files), revision=commit)}
    wrong = []
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        info = found.get(name)
        if info is None:
            wrong.append(name)
        elif info.lfs is not None:
            wrong += [name] * (info.lfs.sha256 != hashlib.sha256(data).hexdigest())
        else:
            wrong += [name] * (info.blob_id != hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
    return wrong
