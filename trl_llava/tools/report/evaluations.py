"""Evaluation numbers: those that `trl-llava eval` has put into runs, and those of an evaluation.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_llava.errors import InputError, NotFoundError
from trl_llava.tools.evaluate.files import NUMBERS, shown
from trl_llava.tools.report.runs import Run


def read_evaluation(path: Path) -> dict[str, Any]:
    """The evaluation.json of `trl-llava eval`, or of its folder."""
    file = path / NUMBERS if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    except FileNotFoundError:
        raise NotFoundError(f"--evaluation: there is no {file}; give the --output_dir of `trl-llava eval`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--evaluation: {file} was not written by `trl-llava eval` ({error!r})") from error
    return found


def evaluation_table(runs: Sequence[Run], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Columns and rows: (task, measure) -> a cell for each column."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        for one in run.numbers:
            measure = one["text"] + (f", by {one['by']}" if one["by"] else "")
            estimate: dict[str, float | None] = {name: one[name] for name in ("value", "low", "high")}
            cells.setdefault((one["task"], measure), {})[run.name] = shown(estimate)
    for task, values in (evaluation or {}).items():
        for own in values["measures"].values():
            measure = own["text"] + (f", by {own['by']}" if own["by"] else "")
            found = {model: shown(estimate) for model, estimate in own["values"].items()}
            cells.setdefault((task, measure), {}).update(found)
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    return {"columns": columns, "rows": {key: [row.get(name, "-") for name in columns] for key, row in cells.items()}}
