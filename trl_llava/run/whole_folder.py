"""A folder that is there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_llava.errors import OccupiedError


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Write a folder beside its place, and move it there once all is written.

    Args:
        target: Where it shall be; absent or empty.

    Yields:
        The folder to write to, on the same file system. It is removed if the block raises or is interrupted.

    Raises:
        FileExistsError: If there is something at `target`.
    """
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OccupiedError(f"{target} is not empty. Choose another DST, or remove it yourself")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        # A folder of this name inside has the permissions that any new folder gets; a temporary one is private.
        written = unfinished / target.name
        written.mkdir()
        yield written
        if target.exists():
            target.rmdir()
        written.rename(target)
    finally:
        shutil.rmtree(unfinished)
