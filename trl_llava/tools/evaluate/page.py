"""An evaluation as one HTML page: measures, then images, questions and answers side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from trl_llava.data.images import ImageRef, load_image
from trl_llava.data.thumbnails import data_url, made_small
from trl_llava.run.atomic_files import write_atomically
from trl_llava.tools.evaluate.files import missing_numbers, shown
from trl_llava.tools.evaluate.results import Outcome, TaskResult

SIDE = 320
"""Longest side of an image on the page, in pixels."""


def write_page(
    path: Path, results: Sequence[TaskResult], found: dict[str, Any], about: dict[str, str], *, examples: int
) -> None:
    """Write the page, with the first `examples` questions of every task."""
    tasks = [
        {
            "name": result.task,
            "models": result.models,
            **found[result.task],
            "examples": [_example(result, number) for number in range(min(examples, len(result.questions)))],
        }
        for result in results
    ]
    # Texts of models and data are text: whatever they hold is escaped.
    loader = PackageLoader("trl_llava.tools", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"shown": shown, "missing_numbers": missing_numbers}
    write_atomically(path, environment.get_template("evaluate/page.html.j2").render(tasks=tasks, about=about))


def _example(result: TaskResult, number: int) -> dict[str, Any]:
    question = result.questions[number]
    outcomes = [own[number] for own in result.outcomes]
    images = question.images() if callable(question.images) else question.images
    return {
        "question": question.text,
        "truth": question.truth,
        "name": question.name,
        "images": [thumbnail(image, question.name) for image in images],
        "differ": len({outcome.wrong for outcome in outcomes}) > 1,
        "wrong": any(outcome.wrong for outcome in outcomes),
        "answers": [
            {"model": model, "pieces": pieces(outcome), "outcome": outcome}
            for model, outcome in zip(result.models, outcomes, strict=True)
        ],
    }


def pieces(outcome: Outcome) -> list[tuple[str, bool]]:
    """An answer's text in parts, each with whether it is marked as wrong.

    >>> pieces(Outcome("A dog and a cat.", marks=[(2, 5)]))
    [('A ', False), ('dog', True), (' and a cat.', False)]
    """
    parts, at = [], 0
    for start, end in outcome.marks:
        parts += [(outcome.text[at:start], False), (outcome.text[start:end], True)]
        at = end
    return [part for part in [*parts, (outcome.text[at:], False)] if part[0]]


def thumbnail(ref: ImageRef, row_name: str) -> str:
    """An image as a data URL: JPEG, or PNG where it is as small as it is, so that few pixels stay sharp."""
    image = load_image(ref, row_name)
    buffer = io.BytesIO()
    made_small(image, SIDE).save(buffer, format="PNG" if max(image.size) <= SIDE else "JPEG", quality=80)
    return data_url(buffer.getvalue())
