"""What is checked before a checkpoint is loaded: that all of it is there, and that its files hold only numbers.

The manifest has the size of every file, the SHA-256 of small ones and that of the header (names, shapes, offsets) of
large safetensors. Hashing the weights themselves would take minutes at 13B, at every save and every resume.
"""

import hashlib
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

from torch.serialization import get_unsafe_globals_in_checkpoint

from trl_llava.errors import InputError
from trl_llava.run.atomic_files import files_in, sync_to_disk

MANIFEST = "manifest.json"
SMALL = 1 << 20
"""Files of at most so many bytes are hashed whole."""
_WRITTEN_BY_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


class DamagedCheckpointError(InputError):
    """A checkpoint with a file that is missing, cut short, changed, or not safe to load."""


def write_manifest(folder: Path) -> None:
    """Describe every file of a finished checkpoint in its `manifest.json`, and force all of it to the disk."""
    files = [path for path in files_in(folder) if path != folder / MANIFEST]
    entries = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    sync_to_disk(folder)


def check_manifest(folder: str | Path) -> None:
    """Raise `DamagedCheckpointError` for the first file that is not as the manifest says; others may be there too."""
    if (problem := _first_problem(Path(folder))) is not None:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {problem}")


def check_deepspeed_files(checkpoint: Path) -> None:
    """Refuse DeepSpeed's files, without running any, if they name anything to call that DeepSpeed does not write.

    DeepSpeed loads them with `weights_only=False`, which calls whatever a file names.
    """
    for file in sorted(checkpoint.glob("global_step*/**/*.pt")):
        name = file.relative_to(checkpoint)
        try:
            called = set(get_unsafe_globals_in_checkpoint(file)) - _WRITTEN_BY_DEEPSPEED
        except (BadZipFile, UnpicklingError, RuntimeError, ValueError) as error:
            problem = f"{name} is not a file that torch writes ({' '.join(str(error).split())[:200]})"
        else:
            if not called:
                continue
            problem = f"{name} has more than DeepSpeed writes, it would call {', '.join(sorted(called))}"
        raise DamagedCheckpointError(
            f"checkpoint {checkpoint} is refused: {problem}. Nothing of it was run. Resume from another checkpoint"
        )


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size <= SMALL:
        return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return {"size": size, "header_sha256": _header_hash(path)} if path.suffix == ".safetensors" else {"size": size}


def _header_hash(path: Path) -> str:
    with open(path, "rb") as file:
        length = file.read(8)  # of the header behind it, little-endian
        header = file.read(min(int.from_bytes(length, "little"), 100_000_000))  # safetensors allows no longer ones
    return hashlib.sha256(length + header).hexdigest()


def _first_problem(folder: Path) -> str | None:
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), dict(entry)) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST}: expected a description of its files, found no such file (not written by this version?)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: expected a description of its files, found something unreadable ({error})"
    for name, (size, entry) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name}: expected {size} bytes, found no such file"
        if (found := path.stat().st_size) != size:
            return f"{name}: expected {size} bytes, found {found}"
        # Manifests of earlier versions hash large files whole too; of those the size is compared.
        for key, digest in _entry(path).items():
            if key != "size" and entry.get(key, digest) != digest:
                part = "its header with SHA-256" if key == "header_sha256" else "SHA-256"
                return f"{name}: expected {part} {str(entry[key])[:16]}..., found {digest[:16]}..."
    return None
