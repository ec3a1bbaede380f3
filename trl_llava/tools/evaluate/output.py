"""Where an evaluation goes: the terminal, a folder with numbers, answers and page, and the cards of runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_llava.errors import InputError, OccupiedError
from trl_llava.publish.card_numbers import Number, add_numbers
from trl_llava.publish.shareable import FACTS_FILE
from trl_llava.tools.evaluate.files import ANSWERS, NUMBERS, PAGE, numbers, table, write_answers, write_numbers
from trl_llava.tools.evaluate.options import positive
from trl_llava.tools.evaluate.page import write_page
from trl_llava.tools.evaluate.results import TaskResult


def add_output(parser: argparse.ArgumentParser, folder: str) -> None:
    """Where the results go."""
    group = parser.add_argument_group("results")
    group.add_argument("--output_dir", default=folder, help=f"(default: {folder})")
    group.add_argument("--examples", type=positive, default=50, help="questions of a task on the page (default: 50)")
    group.add_argument("--update_card", action="store_true", help="put the numbers into the cards of runs")


def check_output(args: argparse.Namespace, models: Sequence[str]) -> Path:
    """The folder for the results; one that holds anything but an earlier evaluation is refused."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OccupiedError(f"--output_dir: {folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in (NUMBERS, ANSWERS)):
        raise OccupiedError(f"--output_dir: {folder} holds something else than an evaluation; choose another folder")
    if args.update_card and not any((Path(model) / FACTS_FILE).is_file() for model in models):
        raise InputError(f"--update_card: none of {', '.join(models)} is the folder of a run (it has no {FACTS_FILE})")
    return folder


def write_results(
    args: argparse.Namespace, results: Sequence[TaskResult], models: dict[str, str], about: dict[str, Any]
) -> None:
    """Write and print what was found; `models` are names by label, `about` is said on the page."""
    folder, found = Path(args.output_dir), numbers(results)
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        write_answers(folder, result)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "examples")}
    write_numbers(folder, found, models, settings)
    write_page(folder / PAGE, results, found, {"models": ", ".join(models), **about}, examples=args.examples)
    if args.update_card:
        for label, model in models.items():
            if (Path(model) / FACTS_FILE).is_file():
                add_numbers(Path(model), _numbers_of(found, label))
    print(table(found))
    print(f"open {folder / PAGE}")


def _numbers_of(found: dict[str, Any], label: str) -> list[Number]:
    rows: list[Number] = []
    for task, values in found.items():
        for name, measure in values["measures"].items():
            estimate = measure["values"].get(label)
            if estimate is None or None in estimate.values():
                continue
            about = {"task": task, "measure": name, "text": measure["text"], "by": measure["by"]}
            rows.append(Number(**about, questions=measure["questions"], **estimate))  # type: ignore[typeddict-item]
    return rows
