"""The completions that a run wrote at some of its steps, `completions/completions_STEP.parquet`."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from trl_llava.ppo.samples import FOLDER
from trl_llava.prompts import message_text

_FILE = re.compile(r"completions_(\d+)\.parquet")
_EARLIER_NAMES = {"query": "prompt", "model response": "completion"}


@dataclass(frozen=True)
class Sample:
    """One completion, with what stands beside it in the table."""

    step: int
    prompt: str
    completion: str
    captions: tuple[str, ...]
    images: tuple[bytes, ...]  # as files
    image_names: tuple[str, ...]
    scores: dict[str, float]

    @property
    def asked(self) -> tuple[Any, ...]:
        """What makes it comparable with another one: the same images and prompt."""
        return self.images, self.image_names, self.prompt, self.captions


def read_samples(run: Path, until: int | None = None) -> tuple[list[Sample], list[str]]:
    """The samples of a run up to a step, by step and row, and a line for each table that cannot be read."""
    samples, problems = [], []
    found = [(_FILE.fullmatch(file.name), file) for file in (run / FOLDER).glob("*.parquet")]
    for step, file in sorted((int(match[1]), file) for match, file in found if match is not None):
        if until is not None and step > until:
            continue
        try:
            table = pd.read_parquet(file).rename(columns=_EARLIER_NAMES)
            samples += [_sample(step, row) for row in table.to_dict("records")]
        except (OSError, ValueError, KeyError, TypeError) as error:  # cut short by a kill, or of another program
            problems.append(f"{FOLDER}/{file.name} is left out: it cannot be read ({type(error).__name__})")
    return samples, problems


def _sample(step: int, row: dict[str, Any]) -> Sample:
    scores = {name: float(value) for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    images = _listed(row.get("images"))
    for image in images:
        Image.open(io.BytesIO(image["bytes"]))  # reads its head
    names = _listed(row.get("image_names")) or [image["path"] for image in images]
    return Sample(
        step=step,
        prompt=_text(row["prompt"]),
        completion=_text(row["completion"]),
        captions=tuple(_listed(row.get("captions"))),
        images=tuple(image["bytes"] for image in images),
        image_names=tuple(name for name in names if name),
        scores=scores,
    )


def _listed(value: Any) -> list[Any]:
    return [] if value is None or isinstance(value, float) else list(value)  # a gap in a column is NaN


def _text(value: Any) -> str:
    """A text, or the last message of TRL's conversations."""
    return value if isinstance(value, str) else message_text(list(value)[-1])
