"""What is known about an image: the captions file, joined to rows by image name."""

import json
from functools import lru_cache
from pathlib import Path, PurePosixPath

from trl_llava.data.contract import RowError
from trl_llava.errors import InputError, NotFoundError

MULTIPLE_CHOICE_PREFIX = "aok_"
"""Begins the keys of multiple-choice rows (A-OKVQA), whose captions hold the answer and its rationale."""


def captions_of(captions_file: str, image_name: str, row_name: str, *, multiple_choice: bool) -> list[str]:
    """Look up the captions of an image.

    Args:
        captions_file: JSON file with `{image name: [captions]}`.
        image_name: The image as the data set names it; without an entry, its last part is looked up.
        row_name: The row, for errors.
        multiple_choice: Whether the row's answer is a letter.

    Returns:
        At least one caption, in the file's order.

    Raises:
        RowError: If the file has no caption of the image.
    """
    captions = read_captions(captions_file)
    prefix = MULTIPLE_CHOICE_PREFIX if multiple_choice else ""
    keys = [prefix + image_name, prefix + PurePosixPath(image_name).name]
    found = next((captions[key] for key in keys if captions.get(key)), None)
    if found is None:
        state = "an empty list for" if any(key in captions for key in keys) else "no entry for"
        raise RowError(
            row_name,
            f"{captions_file} has {state} {keys[0]!r}",
            "Add its captions, or leave the row out",
            "no captions",
        )
    return list(found)


@lru_cache(maxsize=4)
def read_captions(path: str) -> dict[str, list[str]]:
    """Read and check a captions file, once per process.

    Args:
        path: The file.

    Returns:
        Captions by image name.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no JSON object of lists of texts.
    """
    try:
        captions = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"captions_file: cannot read {path} ({error.strerror}).") from error
    except ValueError as error:  # no JSON, or no text at all
        raise InputError(
            f"captions_file {path} is not JSON ({error}). Expected {{image name: [captions]}}."
        ) from error
    if not isinstance(captions, dict):
        raise InputError(
            f"captions_file {path} holds a {type(captions).__name__}, expected {{image name: [captions]}}."
        )
    for image_name, texts in captions.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"captions_file {path}: {image_name!r} has {texts!r}, expected a list of texts.")
    return captions
