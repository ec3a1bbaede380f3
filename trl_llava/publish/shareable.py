"""What of a run's folder may leave this machine: weights and descriptions; no pickles, no paths, no tokens."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trl_llava.errors import InputError
from trl_llava.run.manifest import MANIFEST, write_manifest

SUFFIXES = (".safetensors", ".json", ".yaml", ".jinja", ".model", ".txt", ".md", ".png", ".jpg")
"""Files that are pushed; all else in a folder stays, pickles above all."""

SAMPLES = "samples"
"""Folder of a run with the images that its card shows, and samples.json."""

FACTS_FILE = "card.json"
"""What the card says beside log and files, with the paths of this machine."""

# PEFT writes a README.md into every folder; ours, with its curves, is put beside what is laid out.
_STAYS = {"completions", "runs", MANIFEST, FACTS_FILE, "README.md", "curves.png"}
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Vocabularies may hold anything, also what looks like a path.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")


def lay_out(source: Path, target: Path) -> None:
    """Fill `target` with what loads and describes a checkpoint or finished run; weights are linked, not copied."""

    def stays(folder: str, names: list[str]) -> set[str]:
        return {
            name
            for name in names
            if name.startswith((".", "_", "checkpoint-"))
            or name in _STAYS
            or (Path(name).suffix not in SUFFIXES and not Path(folder, name).is_dir())
        }

    shutil.copytree(source, target, ignore=stays, copy_function=put, dirs_exist_ok=True)


def lay_out_resumable(source: Path, target: Path) -> None:
    """Fill `target` with all of a checkpoint that a run needs to go on from it, pickles of torch among it."""
    stays = shutil.ignore_patterns("training_args.bin", "README.md", MANIFEST, ".*")
    shutil.copytree(source, target, ignore=stays, copy_function=put)
    write_manifest(target)  # of the files without their paths


def without_paths(value: Any) -> Any:
    """Leave of every absolute path in JSON or YAML values its last part.

    >>> without_paths({"dataset_name": "/home/me/rows.json", "model_name_or_path": "org/base"})
    {'dataset_name': 'rows.json', 'model_name_or_path': 'org/base'}
    """
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str) and value.startswith(("/", "~/")) and "\n" not in value:
        return Path(value).name or value
    return value


def put(source: str, target: str) -> None:
    """Link or copy a file; a text without paths, and only if it holds no token (else `InputError`)."""
    path, place = Path(source), Path(target)
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
    if match := _TOKEN.search(text):
        raise InputError(
            f"{path} is not pushed: it holds what looks like a token of the Hub ({match[0][:5]}...). Take it out of "
            "the recipe or data, and revoke it"
        )
    place.write_text(text, encoding="utf-8")
