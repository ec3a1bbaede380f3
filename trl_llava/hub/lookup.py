"""Whether a model or data set is there, found out before anything waits for it: within seconds if there is no network.

The libraries retry five times for each file, so that without network a run would end after minutes.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import cached_file

from trl_llava.errors import InputError, NotFoundError

SECONDS = 10
"""Within which the Hub has to say whether it has a data set."""

# The first is the HTTP library's class of all that can go wrong; which library depends on huggingface_hub's version.
UNREACHABLE: tuple[type[BaseException], ...] = (HfHubHTTPError.__mro__[1], ConnectionError, TimeoutError)
"""What a request raises if there is no network, or the Hub fails."""

_FILES = ("config.json", "adapter_config.json")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_there(field: str, name: str | None, revision: str | None = None) -> str:
    """Return `name` if a folder, the cache or the Hub has this model or adapter; `field` is for the error."""
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
    """The message for a model that neither a folder nor the Hub nor the cache has."""
    if Path(name).is_dir():
        return f"{field}: cannot load '{name}'. The cause: {first_line(error)}"
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:  # no ID on the Hub
        return f"{field}: cannot load '{name}': there is no such folder"
    at = f" (revision {revision})" if revision else ""
    return (
        f"{field}: cannot load '{name}'{at}. Expected a folder, or an ID on the Hub that is public, or that you are "
        f"logged in for (`hf auth login`); without network, one that is in the cache (`hf download {name}` puts it "
        f"there). The cause: {first_line(error)}"
    )


def place_of_data(name: str, config: str | None, revision: str | None, files: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `load_dataset`; without a reply of the Hub, they name what the cache has of that revision.

    `datasets` by itself retries for half a minute before it turns to its cache, and there takes the newest revision,
    whichever was named. `files` are the caller's own `data_files` and `data_dir`, if any.
    """
    try:
        HfApi().dataset_info(name, revision=revision, timeout=SECONDS)
        return {"path": name, "name": config, "revision": revision, **files}
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFoundError(first_line(error)) from error
    except UNREACHABLE:
        pass
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except FileNotFoundError as error:
        at = "it" if revision is None else f"its revision {revision!r}"
        raise NotFoundError(f"the Hub is out of reach, and {at} is not in the cache") from error
    return {"path": folder, "name": config, **(files or _files_of(Path(folder), config))}


def _files_of(folder: Path, config: str | None) -> dict[str, Any]:
    """Where a configuration has its data: `datasets` expects those of the first one, which the cache may lack."""
    card = folder / "README.md"
    configs = DatasetCard.load(card).data.to_dict().get("configs") or [] if card.is_file() else []
    for entry in configs:
        if entry["config_name"] == config or (config is None and entry.get("default")):
            inside = {"path": str(folder / entry["data_dir"]), "name": None} if "data_dir" in entry else {}
            return {**inside, "data_files": entry.get("data_files")}
    return {}


def local_base(adapter: str, base: str | None) -> str | None:
    """The base that an adapter names, found from any directory where the name is relative to that of the training."""
    if not base or Path(base).exists() or not Path(adapter).is_dir():
        return base
    around = (folder / base for folder in Path(adapter).resolve().parents)
    return next((str(folder.resolve()) for folder in around if (folder / "config.json").is_file()), base)


def find_file(name: str, file: str, revision: str | None) -> str | None:
    """The local path of a file in a folder, a Hub repository or the cache; None if it is not there."""
    try:
        return cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository; the caller says so, with every file that it wanted
        return None
