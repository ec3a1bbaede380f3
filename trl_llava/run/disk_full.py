"""A full disk, recognised behind the errors of the libraries that write, and explained."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_llava.errors import ExplainedError

# safetensors and DeepSpeed hand on the text alone; torch's writer says only where it noticed.
_TEXTS = ("No space left on device", "Disk quota exceeded", "inline_container.cc", "iostream error")
_HARDLY_ANY = 1 << 20


class DiskFullError(ExplainedError, OSError):
    """There is no room for what a run saves."""


@contextmanager
def explain_full_disk(folder: Path, what: str, needed: int | None = None, last: Path | None = None) -> Iterator[None]:
    """Turn an error of a write that found no room into one that says what to do; others pass unchanged.

    Args:
        folder: A folder on the disk that is written to.
        what: What is written there, for the message.
        needed: About how many bytes it takes, where that is known.
        last: The last whole checkpoint, if there is one.

    Raises:
        DiskFullError: If the block fails for want of room.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _for_want_of_room(error, folder):
            raise
        raise DiskFullError(_explained(error, folder, what, needed, last)) from error


def size_of(folder: Path) -> int:
    """How much the files of a folder hold.

    Args:
        folder: The folder.

    Returns:
        Bytes.
    """
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _for_want_of_room(error: BaseException, folder: Path) -> bool:
    chain: BaseException | None = error
    while chain is not None:
        if getattr(chain, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(chain) for text in _TEXTS):
            return True
        chain = chain.__cause__ or chain.__context__
    return isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(folder).free < _HARDLY_ANY


def _explained(error: Exception, folder: Path, what: str, needed: int | None, last: Path | None) -> str:
    free = shutil.disk_usage(folder).free
    size = "" if needed is None else f"; it takes about {needed:,} bytes"
    kept = "There is no checkpoint yet" if last is None else f"{last} is whole and was not touched"
    return (
        f"cannot write {what}: the disk of {folder} is full, or its quota is used up ({str(error).strip()}){size}, "
        f"and {free:,} are free now. {kept}. Free some room there (a lower `save_total_limit` keeps fewer "
        "checkpoints), then go on with --resume_from_checkpoint"
    )
