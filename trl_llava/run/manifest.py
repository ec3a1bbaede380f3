"""The manifest of a checkpoint: size and hash of each of its files, so that damage is found before a run goes on."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from trl_llava.errors import InputError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


class DamagedCheckpointError(InputError):
    """A checkpoint with a file that is missing, cut short or changed."""


def write_manifest(folder: Path) -> None:
    """Hash every file of a finished folder and force all of it to the disk.

    Args:
        folder: The folder; its `manifest.json` is written last.
    """
    files = _files(folder)
    with ThreadPoolExecutor() as pool:  # hashing and waiting for the disk both leave the interpreter free
        hashes = list(pool.map(lambda path: _sha256(path, to_disk=True), files))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    for inner in sorted({path.parent for path in files} | {folder}):
        sync_folder(inner)


def check_manifest(folder: str | Path) -> None:
    """Make sure that a checkpoint is what was written.

    Args:
        folder: A checkpoint. Files beyond its manifest are not looked at.

    Raises:
        DamagedCheckpointError: If there is no manifest, or a file is missing, cut short or changed.
    """
    folder = Path(folder)
    stamps = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(folder, all_of=True))
    if (problem := _first_problem(folder, stamps)) is not None:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {problem}")


def force_to_disk(folder: Path) -> None:
    """Force all that a folder holds to the disk, and its list of names.

    Args:
        folder: The folder.
    """
    files = _files(folder, all_of=True)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for inner in sorted({path.parent for path in files} | {folder}):
        sync_folder(inner)


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk.

    Args:
        folder: The folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=64)  # an entry point and its trainer both ask; the stamps notice a change in between
def _first_problem(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str | None:
    """What is wrong with the first file that is not as its manifest says, and what was found instead."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST}: expected the hashes of its files, found no such file (not written by this version?)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: expected the hashes of its files, found something unreadable ({error})"
    for name, (size, _) in expected.items():  # sizes first: they cost nothing
        path = folder / name
        if not path.is_file():
            return f"{name}: expected {size} bytes, found no such file"
        if (found := path.stat().st_size) != size:
            return f"{name}: expected {size} bytes, found {found}"
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: _sha256(folder / name), expected)
        for (name, (_, digest)), found_digest in zip(expected.items(), hashes, strict=True):
            if found_digest != digest:
                return f"{name}: expected SHA-256 {digest[:16]}..., found {found_digest[:16]}..."
    return None


def _files(folder: Path, all_of: bool = False) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and (all_of or path != folder / MANIFEST))


def _sha256(path: Path, to_disk: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if to_disk:
            os.fsync(file.fileno())
    return digest.hexdigest()
