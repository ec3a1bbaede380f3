"""A full disk, recognised behind the errors of the libraries that write, and explained."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_llava.errors import ExplainedError
from trl_llava.run.atomic_files import files_in

# safetensors and DeepSpeed pass on the text alone; torch's writer only says where in its code it failed.
_TEXTS = ("No space left on device", "Disk quota exceeded", "inline_container.cc", "iostream error")
_NEARLY_FULL = 1 << 20  # bytes


class DiskFullError(ExplainedError, OSError):
    """There is no room for what a run saves."""


@contextmanager
def explain_full_disk(folder: Path, what: str, last: Path | None = None) -> Iterator[None]:
    """Raise `DiskFullError` if writing `what` to `folder` finds no room; `last` is the last whole checkpoint."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _no_room(error, folder):
            raise
        kept = "There is no checkpoint yet"
        if last is not None:
            size = sum(path.stat().st_size for path in files_in(last))
            kept = f"{last} is whole and was not touched; it takes about {size:,} bytes"
        raise DiskFullError(
            f"cannot write {what}: the disk of {folder} is full, or its quota is used up ({str(error).strip()}); "
            f"{shutil.disk_usage(folder).free:,} bytes are free now. {kept}. Free some room there (a lower "
            "`save_total_limit` keeps fewer checkpoints), then resume with --resume_from_checkpoint"
        ) from error


def _no_room(error: BaseException, folder: Path) -> bool:
    chain: BaseException | None = error
    while chain is not None:
        if getattr(chain, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(chain) for text in _TEXTS):
            return True
        chain = chain.__cause__ or chain.__context__
    return isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(folder).free < _NEARLY_FULL
