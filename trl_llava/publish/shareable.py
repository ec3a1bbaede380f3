"""What of a run's folder may leave this machine: weights and descriptions, no pickles, no paths, no tokens."""

import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from trl_llava.configs.recipe import Recipe
from trl_llava.errors import InputError
from trl_llava.run.manifest import MANIFEST, write_manifest

SUFFIXES = (".safetensors", ".json", ".yaml", ".jinja", ".model", ".txt", ".md", ".png", ".jpg")
"""Files that are pushed; all else that a folder holds stays, pickles above all."""

SAMPLES = "samples"
"""Folder of a run with the pictures that its card shows, and samples.json."""

FACTS_FILE = "card.json"
"""What the card says beside log and files, with the paths of this machine."""

STAYS = ("checkpoint-*", "completions", "runs", MANIFEST, FACTS_FILE)
ARGUMENTS = "training_args.bin"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Vocabularies may hold anything, also what looks like a path.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")


def stage_run(source: Path, target: Path) -> None:
    """Lay out what is pushed of a checkpoint or a finished run: what loads it, and what describes it.

    Args:
        source: The folder. Its weights are linked, not copied, where the file system allows that.
        target: The folder to fill.

    Raises:
        InputError: If a file has a token in it.
    """
    for folder, inside, files in os.walk(source):
        place = Path(folder).relative_to(source)
        if place == Path("."):  # what is pushed just now is in a hidden folder, and may vanish while we look
            inside[:] = [name for name in inside if not any(Path(name).match(pattern) for pattern in STAYS)]
        inside[:] = sorted(name for name in inside if not name.startswith((".", "_")))
        for name in sorted(files):
            # PEFT writes a README.md of its own into each folder.
            peft = name == "README.md" and (place != Path(".") or source.name.startswith("checkpoint-"))
            if Path(name).suffix in SUFFIXES and not name.startswith((".", "_")) and name not in STAYS and not peft:
                _put(Path(folder, name), target / place / name)


def stage_whole(source: Path, target: Path) -> None:
    """Lay out a checkpoint with all that a run needs to go on from it.

    Args:
        source: The checkpoint.
        target: The folder to fill.

    Raises:
        InputError: If a file has a token in it.
    """
    for path in sorted(source.rglob("*")):
        stays = path.name in (ARGUMENTS, "README.md", MANIFEST) or path.name.startswith(".")
        if path.is_file() and not stays:
            _put(path, target / path.relative_to(source))
    write_manifest(target)


def without_paths(value: Any) -> Any:
    """Leave of every absolute path its last part.

    Args:
        value: Anything that JSON or YAML can hold.

    Returns:
        The same, with names in the place of paths.

    Example:
        >>> without_paths({"dataset_name": "/home/me/rows.json", "model_name_or_path": "org/base"})
        {'dataset_name': 'rows.json', 'model_name_or_path': 'org/base'}
    """
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str) and is_machine_path(value):
        return PureWindowsPath(value).name if PureWindowsPath(value).drive else PurePosixPath(value).name
    return value


def is_machine_path(text: str) -> bool:
    """Whether a text is a path that means something on this machine only.

    Args:
        text: Any text.

    Returns:
        True for absolute paths and those that begin in a home folder.
    """
    if "\n" in text or not text.strip("/\\"):
        return False
    return text.startswith(("/", "~/")) or bool(re.match(r"[A-Za-z]:[\\/]", text))


def shareable_recipe(recipe: Recipe) -> Recipe:
    """The recipe as it is pushed.

    Args:
        recipe: The run's.

    Returns:
        The same without paths of this machine.
    """
    return Recipe(without_paths(recipe.given), without_paths(recipe.defaults))


def check_no_token(name: str, text: str) -> None:
    """Refuse to push a file with a token in it.

    Args:
        name: The file, for the message.
        text: Its content.

    Raises:
        InputError: If there is one.
    """
    if match := TOKEN.search(text):
        raise InputError(
            f"{name} is not pushed: it holds what looks like a token of the Hub ({match[0][:5]}...). Take it out of "
            "the recipe or data, and revoke it"
        )


def _put(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in (".json", ".yaml", ".jinja", ".md", ".txt") or path.name in _VOCABULARIES:
        try:
            os.link(path, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, place)
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        values = json.loads(text)
        clean = without_paths(values)
        text = text if clean == values else json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
    check_no_token(str(path), text)
    place.write_text(text, encoding="utf-8")
