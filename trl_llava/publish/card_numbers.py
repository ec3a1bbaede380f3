"""What an evaluation found of a run, for its model card: a table, and `model-index` in the metadata."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import EvalResult, ModelCard

from trl_llava.run.atomic_files import write_atomically

NUMBERS_FILE = "evaluation_results.json"
"""In the folder of a run; what pushes it later writes the card from it."""

_SECTION = re.compile(r"\n## Evaluation\n.*?(?=\n## |\Z)", re.DOTALL)


class Number(TypedDict):
    """One measure of a task, with its 95 % interval; `by` is the model that gave it, if one did."""

    task: str
    measure: str
    text: str
    by: str
    questions: int
    value: float
    low: float
    high: float


def add_numbers(folder: Path, numbers: Sequence[Number]) -> None:
    """Keep numbers in the folder of a run, in the place of earlier ones of the same measures, and in its card."""
    known = {_key(number): number for number in [*read_numbers(folder), *numbers]}
    kept = list(known.values())
    write_atomically(folder / NUMBERS_FILE, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    file = folder / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data.model_name = card.data.model_name or folder.name
    card.data.eval_results = results_of(kept)
    body = _SECTION.sub("", f"\n{card.text.strip()}\n").strip()
    before, limits, after = body.partition("\n## Limits\n")
    body = f"{before.rstrip()}\n\n{section_of(kept)}\n{limits}{after}"
    write_atomically(file, f"---\n{card.data.to_yaml()}\n---\n\n{body.rstrip()}\n")


def read_numbers(folder: Path) -> list[Number]:
    """The numbers in the folder of a run, none if it has not been evaluated."""
    file = folder / NUMBERS_FILE
    numbers: list[Number] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return numbers


def results_of(numbers: Sequence[Number]) -> list[EvalResult]:
    """The numbers as the Hub's metadata have them."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=number["task"],
            dataset_name=number["task"],
            metric_type=number["measure"],
            metric_name=number["text"] + (f", by {number['by']}" if number["by"] else ""),
            metric_value=round(number["value"], 4),
        )
        for number in numbers
    ]


def section_of(numbers: Sequence[Number]) -> str:
    """The numbers as a table in Markdown; nothing without any."""
    if not numbers:
        return ""
    lines = ["## Evaluation", "", "By `trl-llava eval`; intervals hold 95 % (bootstrap over questions).", ""]
    lines += ["| task | measure | value | interval | questions |", "|---|---|---|---|---|"]
    for number in numbers:
        measure = number["text"] + (f", by {number['by']}" if number["by"] else "")
        cells: list[Any] = [number["task"], measure, f"{number['value']:.3f}"]
        cells += [f"{number['low']:.3f} to {number['high']:.3f}", number["questions"]]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _key(number: Number) -> tuple[str, str, str]:
    return number["task"], number["measure"], number["by"]
