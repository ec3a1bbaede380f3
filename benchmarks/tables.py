"""What a measurement comes to: medians, ratios, tables that can be pasted, and the same as JSON."""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Ratio(NamedTuple):
    """What one side needs as a share of what another needs.

    Attributes:
        side: The side that is measured.
        against: The side it is compared with.
        measure: A key of the runs, such as "seconds" or "peak_mib".
        aim: What the ratio should be at most (or at least, if `more_is_better`); None for none.
        more_is_better: The ratio is that of speeds, the inverse of that of `measure`.
    """

    side: str
    against: str
    measure: str
    aim: float | None = None
    more_is_better: bool = False


def ratio_of(runs: list[dict[str, Any]], ratio: Ratio) -> float:
    """The median over the runs of a ratio between two sides.

    Args:
        runs: What `alternate` returns.
        ratio: Which sides, and what of them.

    Returns:
        The median of the ratios, one for each run.
    """
    values = {
        side: {run["run"]: run[ratio.measure] for run in runs if run["side"] == side and run["run"] != "counted"}
        for side in (ratio.side, ratio.against)
    }
    up, down = (ratio.against, ratio.side) if ratio.more_is_better else (ratio.side, ratio.against)
    return statistics.median(values[up][run] / values[down][run] for run in values[up])


def median_of(runs: list[dict[str, Any]], side: str, *path: str) -> float:
    """The median of a measure of one side.

    Args:
        runs: What `alternate` returns.
        side: The side.
        *path: The measure: a key of the runs, or two, as in `"phases", "update"`; absent means 0.

    Returns:
        The median over the runs that count.
    """
    values = []
    for run in runs:
        if run["side"] == side and run["run"] != "counted":
            value: Any = run
            for key in path:
                value = value.get(key, 0.0)
            values.append(value)
    return statistics.median(values)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table that can be pasted into a Markdown file.

    Args:
        rows: Column -> cell; all rows have the columns of the first.

    Returns:
        The lines of the table.
    """
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def side_table(runs: list[dict[str, Any]]) -> str:
    """Medians of every side: seconds of the step and of its phases, and peak memory.

    Args:
        runs: What `alternate` returns.

    Returns:
        A Markdown table.
    """
    sides = dict.fromkeys(run["side"] for run in runs)
    phases = dict.fromkeys(phase for run in runs for phase in run["phases"])
    return markdown(
        [
            {
                "side": side,
                "s per step": median_of(runs, side, "seconds"),
                "peak MiB over bare": median_of(runs, side, "peak_mib"),
                **{f"{phase} s": median_of(runs, side, "phases", phase) for phase in phases},
            }
            for side in sides
        ]
    )


def memory_table(runs: list[dict[str, Any]]) -> str:
    """Where the peak memory of every side lies: what it holds before a step, and the peak within each phase.

    Args:
        runs: What `alternate` returns.

    Returns:
        A Markdown table of medians, in MiB over the bare process.
    """
    sides = dict.fromkeys(run["side"] for run in runs)
    phases = dict.fromkeys(phase for run in runs for phase in run["peaks"])
    return markdown(
        [
            {
                "side": side,
                "MiB before the step": median_of(runs, side, "held_mib"),
                **{f"{phase} peak": median_of(runs, side, "peaks", phase) for phase in phases},
            }
            for side in sides
        ]
    )


def ratio_table(runs: list[dict[str, Any]], ratios: Mapping[str, Ratio]) -> str:
    """The ratios beside what was aimed at.

    Args:
        runs: What `alternate` returns.
        ratios: Name -> ratio.

    Returns:
        A Markdown table.
    """
    rows = []
    for name, ratio in ratios.items():
        word = "at least" if ratio.more_is_better else "at most"
        aim = f"{word} {ratio.aim:g}" if ratio.aim is not None else None
        rows.append({"ratio": name, "median": ratio_of(runs, ratio), "aim": aim})
    return markdown(rows)


def work_table(runs: list[dict[str, Any]]) -> str:
    """Matrix work of each phase, and which share of the machine's matrix rate the phase reaches with it.

    Args:
        runs: What `alternate` returns, with counted steps.

    Returns:
        A Markdown table.
    """
    rate = matrix_rate()
    rows = []
    for run in runs:
        if run["run"] != "counted":
            continue
        parts = {**run["flops"], "step": sum(run["flops"].values())}
        for phase, flops in parts.items():
            measure = ("seconds",) if phase == "step" else ("phases", phase)
            seconds = median_of(runs, run["side"], *measure)
            share = flops / rate / seconds if seconds else 0.0
            rows.append(
                {"side": run["side"], "phase": phase, "s": seconds, "GFLOP": flops / 1e9, "of matrix rate": share}
            )
    return markdown(rows) + f"\n\nMatrix rate: {rate / 1e9:.0f} GFLOP/s in float32, {torch.get_num_threads()} threads."


def report(runs: list[dict[str, Any]], ratios: Mapping[str, Ratio], path: Path | None) -> None:
    """Print the tables, and write the same as JSON.

    Args:
        runs: What `alternate` returns.
        ratios: Name -> ratio.
        path: The JSON file `{"ratios": {name: median}, "runs": [...]}`; None for none.
    """
    print(side_table(runs), end="\n\n")
    print(memory_table(runs), end="\n\n")
    print(ratio_table(runs, ratios), end="\n\n")
    if any(run["run"] == "counted" for run in runs):
        print(work_table(runs), end="\n\n")
    if path is not None:
        write_json(path, {name: ratio_of(runs, ratio) for name, ratio in ratios.items()}, runs)


def write_json(path: Path, ratios: Mapping[str, float | None], runs: list[dict[str, Any]]) -> None:
    """Write what was measured.

    Args:
        path: The file.
        ratios: Name -> median.
        runs: What the medians are of.
    """
    path.write_text(json.dumps({"ratios": dict(ratios), "runs": runs}, indent=2) + "\n")


def matrix_rate(size: int = 1024, repeats: int = 7) -> float:
    """The rate at which this machine multiplies large float32 matrices.

    Args:
        size: Rows and columns.
        repeats: How often; the best counts.

    Returns:
        Floating-point operations per second.
    """
    a, b = torch.ones(size, size), torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        description: What the command measures.

    Returns:
        A parser with `--runs` and `--json`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=5, help="steps of each side that count, after one that does not")
    parser.add_argument("--json", type=Path, help="write ratios and runs to this file")
    return parser
