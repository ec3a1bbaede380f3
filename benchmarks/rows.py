"""Rows whose tokens can be counted, as files on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.workload import SPECIAL, Size


def words(rng: np.random.Generator, count: int, size: Size) -> str:
    """Random words, each of them a token.

    Args:
        rng: Where they come from.
        count: How many.
        size: Knows the vocabulary.

    Returns:
        The text.
    """
    return " ".join(f"w{i}" for i in rng.integers(size.vocabulary - len(SPECIAL), size=count))


def make_rows(size: Size, folder: Path, count: int, answers: dict[str, tuple[int, int]], *, seed: int = 0) -> Path:
    """Write rows, each with a picture of its own and a question, and the pictures.

    Args:
        size: Lengths of questions, and pixels of pictures.
        folder: Where `rows.jsonl` and the pictures go.
        count: How many rows.
        answers: Column (`completion`, `chosen`, ...) -> fewest and most words of the answers in it.
        seed: Of all that is random.

    Returns:
        The file with the rows.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        pixels = rng.integers(256, size=(size.image_size, size.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        row: dict[str, Any] = {
            "images": [f"{index}.png"],
            "prompt": [{"role": "user", "content": words(rng, size.question, size)}],
        }
        for column, (fewest, most) in answers.items():
            text = words(rng, int(rng.integers(fewest, most + 1)), size)
            row[column] = [{"role": "assistant", "content": text}]
        row["captions"] = [words(rng, 10, size) for _ in range(5)]  # as COCO has them
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Recipe values as the words of a command line.

    Args:
        values: Key -> value.

    Returns:
        The words.
    """
    return [word for key, value in values.items() for word in (f"--{key}", "null" if value is None else str(value))]
