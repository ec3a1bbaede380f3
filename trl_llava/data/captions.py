"""What is known about an image: the captions file, joined to rows by image name."""

import json
from functools import lru_cache
from pathlib import Path, PurePosixPath

from trl_llava.data.contract import NO_CAPTIONS, RowError
from trl_llava.errors import InputError, NotFoundError

MULTIPLE_CHOICE_PREFIX = "aok_"
"""Begins the keys of multiple-choice rows (A-OKVQA), whose captions hold the right answer and its rationale."""


def captions_of(captions_file: str, image_name: str, row_name: str, *, multiple_choice: bool) -> list[str]:
    """Captions of an image, in the file's order: by its name as the data set has it, else by the name's last part.

    `multiple_choice` says that the row's answer is a letter, so that its own entry is looked up. An image without a
    caption is a `RowError`.
    """
    captions = read_captions(captions_file)
    prefix = MULTIPLE_CHOICE_PREFIX if multiple_choice else ""
    keys = [prefix + image_name, prefix + PurePosixPath(image_name).name]
    found = next((captions[key] for key in keys if captions.get(key)), None)
    if found is None:
        state = "an empty list for" if any(key in captions for key in keys) else "no entry for"
        problem = f"{captions_file} has {state} {keys[0]!r}"
        raise RowError(row_name, problem, "Add its captions, or leave the row out", NO_CAPTIONS)
    return list(found)


@lru_cache(maxsize=4)
def read_captions(path: str) -> dict[str, list[str]]:
    """Captions by image name, read and checked once per process."""
    expected = "Expected {image name: [captions]}."
    try:
        captions = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"captions_file: cannot read {path} ({error.strerror}).") from error
    except ValueError as error:  # no JSON, or no text at all
        raise InputError(f"captions_file {path} is not JSON ({error}). {expected}") from error
    if not isinstance(captions, dict):
        raise InputError(f"captions_file {path} holds a {type(captions).__name__}. {expected}")
    for image_name, texts in captions.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"captions_file {path}: {image_name!r} has {texts!r}, expected a list of texts.")
    return captions
