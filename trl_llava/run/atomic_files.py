"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_llava.errors import OccupiedError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A folder to write to, beside `target` (absent or empty); it moves there unless the block raises."""
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OccupiedError(f"{target} is not empty. Choose another DST, or remove it yourself")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        # A folder inside has the permissions that any new folder gets; a temporary one is private.
        written = unfinished / target.name
        written.mkdir()
        yield written
        if target.exists():
            target.rmdir()
        written.rename(target)
    finally:
        shutil.rmtree(unfinished)


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_to_disk(folder: Path) -> None:
    """Force all files of a folder to the disk, and the names in it."""
    files = files_in(folder)
    for path in [*files, *sorted({path.parent for path in files} | {folder})]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Force one file, or the list of names of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
