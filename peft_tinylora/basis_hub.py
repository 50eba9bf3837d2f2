"""Basis files <-> a repository on the Hub, so that whoever downloads an adapter need not compute its basis.

A repository holds files of the cache under their own names, at its root: one for each form of the weights, rank and set
of modules. What is fetched is checked like what is cached; nothing in it is executed. The token is the one that
`hf auth login` keeps.
"""

import logging
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from . import basis_cache
from .errors import BasisError, first_line


logger = logging.getLogger(__name__)


def push(path: Path, repository: str, private: bool | None = None) -> str:
    """Upload a file of the cache, as one commit; the repository is made if there is none.

    Args:
        path (`Path`): the file.
        repository (`str`): Hub id, "user/name".
        private (`bool`, *optional*): of a repository that is made here.

    Returns:
        `str`: URL of the commit.

    Raises:
        BasisError: if the file is damaged.
        HfHubHTTPError: from the Hub; nothing is half-uploaded.
    """
    if not basis_cache.is_sound(path):
        raise BasisError(f"{path} is damaged or no basis file, and was not pushed: run `peft-tinylora basis build`.")
    api = HfApi(library_name="peft_tinylora")
    api.create_repo(repository, exist_ok=True, private=private)
    message = f"Basis {path.name} with peft_tinylora"
    done = api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repository, commit_message=message)
    return done.commit_url


def fetch(repository: str, name: str) -> Path | None:
    """Download a basis file, or find it in the Hub's own cache.

    Args:
        repository (`str`): Hub id.
        name (`str`): from [`basis_cache.file_name`].

    Returns:
        `Path`, or `None`, with a warning, where the repository has none or cannot be reached: then the basis is
        computed.
    """
    try:
        return Path(hf_hub_download(repository, name, library_name="peft_tinylora"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        logger.warning("no basis %s from %r (%s): it is computed.", name, repository, first_line(error))
        return None
