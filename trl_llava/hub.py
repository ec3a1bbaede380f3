"""Whether a model is there: asked once and with a time limit, before anything waits for it.

The libraries ask five times more for each file, so that without network a run would end after minutes.
"""

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from trl_llava.errors import InputError, NotFoundError

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
