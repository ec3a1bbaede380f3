"""Whether a model or data set is there: asked once and with a time limit, before anything waits for it.

The libraries ask five times more for each file, so that without network a run would end after minutes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import datasets
from datasets import Dataset
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import cached_file

from trl_llava.errors import InputError, NotFoundError

SECONDS = 10
"""How long the Hub may take to say whether it has something."""

UNREACHABLE: tuple[type[BaseException], ...] = (HfHubHTTPError.__mro__[1], ConnectionError, TimeoutError)
"""What a request to a Hub out of reach raises; the first is the HTTP library's own class for all that can go wrong on
the way, and which library that is depends on the version of huggingface_hub."""

_FILES = ("config.json", "adapter_config.json")


def check_there(field: str, name: str | None, revision: str | None = None) -> str:
    """Make sure that a folder, the cache or the Hub has a model or adapter.

    Args:
        field: The recipe's field that names it, for the message.
        name: Hub ID or folder.
        revision: Branch, tag or commit.

    Returns:
        The name.

    Raises:
        InputError: If there is no name.
        NotFoundError: If it is nowhere, or not within reach.
    """
    if not name:
        raise InputError(f"{field} is not set; give a Hub ID or a folder")
    if Path(name).is_dir():
        return name
    try:
        if not any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _FILES):
            snapshot_download(name, revision=revision, allow_patterns=list(_FILES))
    except (OSError, ValueError) as error:  # ValueError: no name that the Hub could have
        raise NotFoundError(not_found(field, name, revision, error)) from error
    return name


def not_found(field: str, name: str, revision: str | None, error: Exception) -> str:
    """What to say when neither a folder nor the Hub nor the cache has it.

    Args:
        field: The recipe's field that names it.
        name: Hub ID or folder.
        revision: Branch, tag or commit.
        error: Why it cannot be loaded.

    Returns:
        The message.
    """
    at = f" (revision {revision})" if revision else ""
    return (
        f"{field}: cannot load '{name}'{at}. Expected a folder, or an ID on the Hub that is public, or that you are "
        f"logged in for (`hf auth login`); without network, one that is in the cache (`hf download {name}` puts it "
        f"there). The cause: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    )


@contextmanager
def asked_once(name: str, revision: str | None) -> Iterator[Callable[[Dataset], None]]:
    """Load a data set inside, from the cache if one request does not reach the Hub.

    `datasets` by itself asks again and again, for half a minute, before it looks into its cache; and there it takes
    the newest revision, whichever was named.

    Args:
        name: Hub ID of a data set.
        revision: Branch, tag or commit.

    Yields:
        A check that what was loaded is of that revision.

    Raises:
        NotFoundError: If the Hub has no such data set or revision.
    """
    try:
        HfApi().dataset_info(name, revision=revision, timeout=SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFoundError(str(error).strip().splitlines()[0]) from error
    except UNREACHABLE:
        commit = None if revision is None else _cached_commit(name, revision)
        with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(datasets.config, "HF_HUB_OFFLINE", True):
            yield lambda dataset: _check_commit(revision, commit, dataset)
        return
    yield lambda dataset: None


def _cached_commit(name: str, revision: str) -> str:
    """The commit that a revision was when it was last seen; its data become those that `datasets` looks at first."""
    reference = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", revision)
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = "___".join([*name.split("/")[:-1], camelcase_to_snakecase(name.split("/")[-1])])
    for cached in Path(datasets.config.HF_DATASETS_CACHE, folder).glob(f"*/*/{commit}*"):
        os.utime(cached)
    return commit


def _check_commit(revision: str | None, commit: str | None, dataset: Dataset) -> None:
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if commit is not None and not all(folder.startswith(commit) for folder in folders):
        raise NotFoundError(f"the Hub is out of reach, and the cache has no revision {revision!r}, only another one")


def find_file(name: str, file: str, revision: str | None) -> str | None:
    """Look a file up in a folder, a Hub repository or the cache.

    Args:
        name: Hub ID or folder.
        file: Name of the file.
        revision: Branch, tag or commit.

    Returns:
        Its local path, or None if it is not there.
    """
    try:
        return cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository; the caller says so, with all that it looked for
        return None
