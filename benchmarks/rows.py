"""Rows whose tokens can be counted, as files on disk."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.workload import SPECIAL, Size

NOTHING_ELSE: dict[str, Any] = {
    "learning_rate": 1e-5,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Config fields of every trainer that is measured, ours or TRL's: its steps, and nothing beside them."""


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


def make_rows(
    size: Size,
    folder: Path,
    count: int,
    answers: Mapping[str, tuple[int, int] | list[tuple[int, int]]],
    *,
    seed: int = 0,
) -> Path:
    """Write rows, each with a picture of its own and a question, and the pictures.

    Args:
        size: Lengths of questions, and pixels of pictures.
        folder: Where `rows.jsonl` and the pictures go.
        count: How many rows.
        answers: Column (`completion`, `chosen`, ...) -> fewest and most words of the answers in it; or such a pair for
            each row, over and over.
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
        for column, spans in answers.items():
            fewest, most = spans if isinstance(spans, tuple) else spans[index % len(spans)]
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


def run_stage(main: Callable[[Sequence[str]], None], folder: Path, size: Size, values: Mapping[str, Any]) -> None:
    """Run a stage as a user does, with a fresh adapter; what it writes is thrown away.

    Args:
        main: Its entry point.
        folder: Has the base model and the rows.
        size: Knows the adapter's rank.
        values: All other keys of the recipe; those that are given here too count instead.
    """
    with tempfile.TemporaryDirectory(dir=folder) as output:
        main(stage_words(folder, size, {**values, "output_dir": output}))


def stage_words(folder: Path, size: Size, values: Mapping[str, Any]) -> list[str]:
    """The command line of a stage with a fresh adapter, as `run_stage` runs it."""
    recipe = {
        "model_name_or_path": folder / "base",
        "use_peft": True,
        "lora_r": size.rank,
        "lora_alpha": size.rank,
        "dataset_name": folder / "rows" / "rows.jsonl",
        "image_folder": folder / "rows",
    }
    return command_line({**recipe, **values})
