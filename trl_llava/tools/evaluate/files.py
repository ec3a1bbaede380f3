"""An evaluation as a table for the terminal and as files: numbers as JSON, answers as JSON lines."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_llava.run.atomic_files import write_atomically
from trl_llava.run.versions import versions
from trl_llava.tools.evaluate.results import TaskResult
from trl_llava.tools.evaluate.statistics import Estimate

NUMBERS = "evaluation.json"
PAGE = "evaluation.html"
ANSWERS = "answers"


def numbers(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Every measure of every task, with 95 % intervals, by task, measure and model."""
    return {result.task: _task_numbers(result) for result in results}


def _task_numbers(result: TaskResult) -> dict[str, Any]:
    measures = {}
    for measure in result.measures:
        estimates, differences = result.estimates(measure), result.differences(measure)
        measures[measure.name] = {
            "text": measure.text,
            "better": measure.better,
            "by": measure.by,
            "questions": result.counted(measure),
            "reasons": result.reasons(measure, estimates),
            "values": {model: _plain(found) for model, found in zip(result.models, estimates, strict=True)},
            "differences": {model: _plain(found) for model, found in zip(result.models[1:], differences, strict=True)},
        }
    return {"questions": len(result.questions), "note": result.note, "measures": measures}


def _plain(found: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in found._asdict().items()}


def table(found: dict[str, Any]) -> str:
    """The numbers of `numbers` as text, `of` how many questions each is.

    A star marks a difference whose interval does not hold 0; below stands why a model lacks a number.
    """
    lines = []
    for task, values in found.items():
        lines += [f"{task}: {values['note']}"]
        measures = values["measures"]
        names = {name: name + (f" ({own['by']})" if own["by"] else "") for name, own in measures.items()}
        models = list(next(iter(measures.values()))["values"]) if measures else []
        levels = [["", "of", *models]]
        changes = [["", *(f"{model} - {models[0]}" for model in models[1:])]]
        for name, own in measures.items():
            levels.append([names[name], str(own["questions"]), *(shown(one) for one in own["values"].values())])
            changes.append([names[name], *(shown(one, signed=True) for one in own["differences"].values())])
        if len(models) == 2:  # side by side; of more models, below
            levels, changes = [[*row, *more[1:]] for row, more in zip(levels, changes, strict=True)], []
        lines += [*_aligned(levels), *missing_numbers(measures), ""]
        lines += [*_aligned(changes), ""] if len(models) > 2 else []
    return "\n".join(lines)


def missing_numbers(measures: dict[str, Any]) -> list[str]:
    """For each reason why numbers are missing, whose and which: a line each."""
    named: dict[tuple[str, str], list[str]] = {}
    for name, own in measures.items():
        for model, reason in own["reasons"].items():
            named.setdefault((model, reason), []).append(name)
    return [f"- {model} has no {', '.join(names)}: {reason}" for (model, reason), names in named.items()]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def shown(found: dict[str, float | None], *, signed: bool = False) -> str:
    """An estimate as a cell.

    >>> shown({"value": -0.5, "low": -0.75, "high": -0.25}, signed=True)
    '-0.500 [-0.750, -0.250] *'
    """
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or high is None:
        return "-"
    sign = "+" if signed else ""
    star = " *" if signed and (low > 0 or high < 0) else ""
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{star}"


def write_numbers(folder: Path, found: dict[str, Any], models: dict[str, str], settings: dict[str, Any]) -> None:
    """Write evaluation.json: the numbers, and what they were made with."""
    record = {"models": models, "settings": settings, "versions": versions(), "tasks": found}
    write_atomically(folder / NUMBERS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_answers(folder: Path, result: TaskResult) -> None:
    """Write answers/TASK.jsonl: a line for each question with the answer of every model."""
    (folder / ANSWERS).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, question in enumerate(result.questions):
        answers = {}
        for model, outcomes in zip(result.models, result.outcomes, strict=True):
            outcome = outcomes[number]
            note = {"note": outcome.note} if outcome.note else {}
            answers[model] = {"text": outcome.text, "wrong": outcome.wrong, **note, **outcome.details}
        record = {"row_name": question.name, "question": question.text, "truth": question.truth, "answers": answers}
        lines.append(json.dumps(record, ensure_ascii=False))
    write_atomically(folder / ANSWERS / f"{file_name(result.task)}.jsonl", "\n".join(lines) + "\n")


def file_name(task: str) -> str:
    """A task's name as a file's, without what a path could hold."""
    return re.sub(r"[^\w.-]+", "_", task).removesuffix(".jsonl").strip(".") or "task"


def short_names(tasks: Sequence[str]) -> list[str]:
    """What tables call tasks: a file by its name, or by its path where another has that name.

    >>> short_names(["pope", "data/own.jsonl", "a/test.jsonl", "b/test.jsonl"])
    ['pope', 'own.jsonl', 'a/test.jsonl', 'b/test.jsonl']
    """
    names = [Path(task).name for task in tasks]
    return [name if names.count(name) == 1 else task for task, name in zip(tasks, names, strict=True)]


def labels(models: Sequence[str]) -> list[str]:
    """What tables call models: the shortest ends of their paths that differ; of a Hub ID, and of a checkpoint, two.

    >>> labels(["/runs/sft", "/runs/ppo/checkpoint-40", "org/base"])
    ['sft', 'ppo/checkpoint-40', 'org/base']
    """
    parts = [Path(model).parts for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        found = []
        for model, own in zip(models, parts, strict=True):
            folder = Path(model).is_dir() or model.startswith((".", "/"))
            least = 1 if folder and not own[-1].startswith("checkpoint-") else 2
            found.append("/".join(own[-max(length, least) :]).lstrip("/"))
        if len(set(found)) == len(found):
            return found
    return list(models)
