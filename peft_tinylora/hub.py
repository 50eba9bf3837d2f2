"""An adapter's folder -> a repository on the Hub, as one commit of the files named here and nothing else; and back.

`PeftModel.push_to_hub` and the trainers' own pushes upload what lies in the folder (a pickled training_args.bin, tokenizers
nobody changed, paths of this machine) and replace the card. Here a push reads the folder and changes nothing in it, so that
it can be repeated; what the Hub holds already is not sent again. Files of an earlier push that are not in this one are
removed in the same commit: a tokenizer left behind would be loaded.
"""

import hashlib
import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    RepoFile,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import card
from .adapter_files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    explained,
    find_adapter,
    reason_of,
)
from .describe import Description, describe
from .errors import AdapterFileError, ConfigError, HubError, first_line
from .output_folder import written_at_once
from .published import A_TOKEN


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
EVAL_RESULTS = ".eval_results/peft_tinylora_*.yaml"  # not those of other people
REPORT_FILES = (
    "README.md",
    "recipe.yaml",  # what the recipe was set to
    "reward_curve.csv",
    "reward_curve.png",
    "loss_curve.csv",
    "loss_curve.png",
)
FILES = (*ADAPTER_FILES, *REPORT_FILES, *TOKENIZER_FILES, EVAL_RESULTS)
TEXTS = (".md", ".yaml", ".json", ".csv", ".jinja", ".txt")
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
    where it is not that of the base model. A card that a recipe wrote is made anew for the repository; where there is none,
    one is made of what the files say. Server errors, lost connections and commits of others in the meantime are tried again.

    Args:
        folder (`str` or `Path`): of the adapter. Not changed.
        repository (`str`): id on the Hub; made if there is none.
        revision (`str`, *optional*): branch to commit to, made if there is none. Defaults to main.
        private (`bool`, *optional*): whether the repository is to be private; one that is public is refused.
        token (`str`, *optional*): defaults to the one that is stored.
        base (`str`, *optional*): Hub id of the base model, where the adapter's config names a folder.

    Raises:
        AdapterFileError, ConfigError: if the folder holds no sound adapter, or what must not be published; before anything
            is sent. If the repository is no place for it.
        HubError: if the Hub refuses or stays unreachable; says how to push again.
    """
    folder = Path(folder)
    api = HfApi(library_name="peft_tinylora", token=token)
    files = files_to_push(api, folder, repository, base, revision)
    refuse_tokens(files, token)
    try:
        return tried_again(lambda: _commit(api, files, repository, revision, private))
    except ConfigError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        again = ["peft-tinylora", "push", str(folder), repository]
        again += ["--revision", revision] if revision else []
        again += ["--base", base] if base else []
        again += ["--private"] if private else []
        raise HubError(
            f"{repository}: {reason_of(error, revision)} Nothing in {folder} was changed; to push it again: "
            f"{shlex.join(again)}"
        ) from error


def check_access(repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """The full id of a repository that can be pushed to, which is made if there is none; for before a long training.

    Raises:
        ConfigError: if it is no place for an adapter.
        HubError: if the token may not write to it, or the Hub cannot be reached.
    """
    api = HfApi(library_name="peft_tinylora", token=token)

    def check() -> str:
        full = api.create_repo(repository, private=private, exist_ok=True).repo_id
        _refuse_another_kind(api.model_info(full), full, private)
        # Asks the Hub how a file would be uploaded, for which it wants the right to write; uploads nothing.
        api.preupload_lfs_files(full, [CommitOperationAdd("README.md", b"?")])
        return full

    with explained(repository):
        return tried_again(check)


def pull(
    repository: str, folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> tuple[Description, list[str]]:
    """Download an adapter into a folder: the files that [`push`] uploads, those that there are, and no others.

    Args:
        repository (`str`): id on the Hub.
        folder (`str` or `Path`): must not hold any of the files yet; all of them are written or none.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str`, *optional*): defaults to the one that is stored.

    Returns:
        [`Description`] and `list[str]`: what was downloaded, which was checked, and the names of the files.

    Raises:
        AdapterFileError, ConfigError: if the folder holds such a file, or the repository no sound adapter.
        HubError: if the Hub refuses or cannot be reached.
    """
    api = HfApi(library_name="peft_tinylora", token=token)
    with explained(repository, revision):
        info = tried_again(lambda: api.model_info(repository, revision=revision))
    names = sorted(sibling.rfilename for sibling in info.siblings or [] if is_of_adapter(sibling.rfilename))
    with written_at_once(folder) as partial:
        for name in names:
            with explained(repository, revision):
                path = hf_hub_download(repository, name, revision=info.sha, token=token, library_name="peft_tinylora")
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, partial / name)
        try:
            description = describe(find_adapter(partial))
        except AdapterFileError as error:
            raise AdapterFileError(str(error).replace(str(partial), repository)) from error
    return description, names


def is_of_adapter(name: str) -> bool:
    """Whether a file of a repository is one that [`push`] uploads."""
    # In names that somebody else chose, `*` must not stand for a folder.
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in FILES)


def files_to_push(
    api: HfApi, folder: Path, repository: str, base: str | None, revision: str | None
) -> dict[str, bytes | Path]:
    """What a push of a folder consists of: name in the repository -> content.

    Raises:
        AdapterFileError, ConfigError: as [`push`].
    """
    refuse_links_to_elsewhere(folder)
    adapter = describe(find_adapter(folder))
    base = public_base(api, adapter, folder, base)
    config = json.loads((folder / CONFIG_FILE).read_bytes()) | {"base_model_name_or_path": base}
    files: dict[str, bytes | Path] = {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True)).encode(),
        WEIGHTS_FILE: folder / WEIGHTS_FILE,
    }
    readme = folder / "README.md"
    text = card.read_readme(readme)
    facts = card.read_facts(folder, adapter)
    if not text.strip() or card.is_empty_form(text):
        facts = card.Facts()
    if facts is None:
        files |= {path.relative_to(folder).as_posix(): path for path in folder.glob(EVAL_RESULTS)}
    else:
        text = str(card.make_card(adapter, repository, facts, base, revision))
        files |= {name: result.encode() for name, result in card.eval_result_files(facts).items()}
    check_metadata(text, readme)
    files["README.md"] = text.encode()
    with_tokenizer = has_own_tokenizer(folder, base, adapter.config.revision, api.token)
    names = [name for name in FILES if with_tokenizer or name not in TOKENIZER_FILES]
    return {name: folder / name for name in names if (folder / name).is_file()} | files


def refuse_links_to_elsewhere(folder: Path) -> None:
    """Raise a [`ConfigError`] where a file that would be pushed is a link out of its folder.

    A cloned repository may hold a card that is a link to a private file of whoever cloned it, and pushes it again.
    """
    inside = folder.resolve()
    blobs = inside.parent.parent / "blobs"  # in the Hub's cache, a snapshot is links to them
    for path in (path for pattern in FILES for path in folder.glob(pattern)):
        file = path.resolve()
        if not file.is_relative_to(inside) and not file.is_relative_to(blobs):
            raise ConfigError(
                f"{path} is a link to {file}: put the file itself there, or remove the link. Nothing was pushed."
            )


def public_base(api: HfApi, adapter: Description, folder: Path, base: str | None) -> str:
    """The Hub id of the base model that a pushed adapter names; raises [`ConfigError`] where nobody else has that."""
    named = base or adapter.config.base_model_name_or_path
    if named is None:
        problem = "does not name its base model"
    elif base is None and Path(named).exists():
        problem = f"names a folder of this machine as its base model ({named})"
    else:
        try:
            validate_repo_id(named)
            if base is None:  # a folder of another machine may look like an id
                api.model_info(named, revision=adapter.config.revision)
            return named
        except (HFValidationError, RepositoryNotFoundError):
            problem = f"names {named} as its base model, which is not on the Hub"
        except (HTTPError, OSError):
            return named  # the push will say what is wrong with the Hub
    raise ConfigError(f"{folder} {problem}: say by --base user/name where everybody finds it.")


def check_metadata(text: str, readme: Path) -> None:
    """Raise a [`ConfigError`] where the metadata of a card cannot be read."""
    try:
        ModelCard(text)
    except card.UNREADABLE as error:
        raise ConfigError(
            f"the metadata in {readme} cannot be read ({first_line(error)[:200]}): mend or remove it."
        ) from error


def has_own_tokenizer(folder: Path, base: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether a folder has a tokenizer that is not that of the base model, or that cannot be compared with it."""
    if not (folder / "tokenizer_config.json").exists():
        return False
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        of_base = AutoTokenizer.from_pretrained(base, revision=revision, token=token, trust_remote_code=False)
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
    before = api.model_info(repository, revision=revision)
    there = {sibling.rfilename for sibling in before.siblings or []}
    _refuse_another_kind(before, repository, private)
    operations: list[CommitOperationAdd | CommitOperationDelete]
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


def _refuse_another_kind(info: ModelInfo, repository: str, private: bool | None) -> None:
    """Raise a [`ConfigError`] where a repository is a model's, or public where it was to be private."""
    there = {sibling.rfilename for sibling in info.siblings or []}
    if "config.json" in there and CONFIG_FILE not in there:
        raise ConfigError(f"{repository} holds a model (config.json) and no adapter: push to another name.")
    if private and not info.private:
        raise ConfigError(f"{repository} is public already: make it private on its page, or push to another name.")


def _different(api: HfApi, files: Mapping[str, bytes | Path], repository: str, commit: str) -> list[str]:
    """The files of a commit that are not on the Hub as they were sent, by the hashes that it keeps."""
    there = api.get_paths_info(repository, list(files), revision=commit)
    found = {info.path: info for info in there if isinstance(info, RepoFile)}
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
