"""How time and memory of a PPO step grow with image tokens, response length, batch and processes.

    python -m benchmarks.scaling [--json FILE] [--runs 5]

One of them grows at a time, the others stay at the first point's; the batch is split over the processes. The order of
growth is the slope between the first and the last point on doubly logarithmic paper: 1 is linear, 2 quadratic.
"""

import functools
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import Gate
from benchmarks.harness import alternate, bare_memory, quiet, returning_freed_memory, say, steps_needed
from benchmarks.ppo_sides import Step, our_side, prepare
from benchmarks.tables import arguments, markdown, median_of, write_json
from benchmarks.workload import TOY, Size, describe

SMALL = Size(vocabulary=8_000, hidden=128, layers=4, heads=4, tower_hidden=64, tower_layers=3, image_tokens=144)
GROWING: dict[str, tuple[int, ...]] = {
    "image tokens": (144, 576, 1296),
    "response length": (32, 128, 512),
    "batch": (4, 8, 16),
    "processes": (1, 2),
}
RATIOS = {f"{measure} by {what}": (what, measure) for what in GROWING for measure in ("seconds", "peak_mib")}
PROCESSES = "processes"


def points(what: str, values: Sequence[int], start: Step) -> dict[int, Step]:
    """The steps in which one thing grows.

    Args:
        what: A key of `GROWING`.
        values: How large it is at each point.
        start: All else.

    Returns:
        Value -> step. Answers have four lengths, evenly spread up to the limit.
    """
    steps = {}
    for value in values:
        step, batch = start, len(start.lengths)
        if what == "image tokens":
            step = replace(step, size=replace(step.size, image_tokens=value))
        elif what == "response length":
            step = replace(step, response_length=value)
        elif what == "batch":
            batch = value
        quarter = step.response_length / 4
        lengths = tuple(round(quarter * (1 + row % 4)) for row in range(batch))
        steps[value] = replace(step, lengths=lengths)
    return steps


class Follower(Gate):
    """A gate that never closes: processes other than the first wait for that one anyway."""

    def __init__(self) -> None:
        """Measure nothing."""
        super().__init__(multiprocessing.Pipe()[0])

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Go on."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Go on."""


def one_of(gate: Gate | None, rank: int, processes: int, port: int, folder: Path, step: Step) -> None:
    """Run one process of several, as `accelerate launch` would start it.

    Args:
        gate: The gate of the first process.
        rank: Which process this is.
        processes: How many there are.
        port: Where they meet.
        folder: What `prepare` has written.
        step: What a step does, of all processes together.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        share = len(step.lengths) // processes
        step = replace(step, lengths=step.lengths[rank * share : (rank + 1) * share], processes=processes)
    if gate is None:
        quiet()
        gate = Follower()
    our_side(gate, folder, step)


@contextmanager
def followers(processes: int, port: int, folder: Path, step: Step) -> Iterator[None]:
    """All processes but the first.

    Args:
        processes: How many there are with the first.
        port: Where they meet.
        folder: What `prepare` has written.
        step: What a step does.

    Yields:
        Nothing.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    for rank in range(1, processes):
        process = context.Process(target=one_of, args=(None, rank, processes, port, folder, step), daemon=True)
        process.start()
        started.append(process)
    try:
        yield
    finally:
        for process in started:
            process.kill()  # not terminate: a trainer takes SIGTERM as the wish for a last checkpoint
            process.join()


def free_port() -> int:
    """A port of this machine that nobody listens on.

    Returns:
        Its number.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def bare(step: Step) -> float:
    """What one process takes without a model to speak of.

    Args:
        step: Any step.

    Returns:
        MiB.
    """
    toy = replace(step, size=TOY, lengths=step.lengths[:1], response_length=max(step.lengths[:1]), micro_batch=1)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), toy)
        return bare_memory("bare", functools.partial(our_side, folder=Path(name), step=toy))


def measure(what: str, steps: dict[int, Step], runs: int, bare_mib: float = 0.0) -> list[dict[str, Any]]:
    """Run the points of one thing that grows, in turn.

    Args:
        what: Its name.
        steps: Value -> step.
        runs: How many steps of each point count.
        bare_mib: What `bare` returns; peaks are counted from there.

    Returns:
        One entry per point and run; `side` is the point's value, `growing` is `what`.
    """
    entries = []
    for value, step in steps.items():
        processes = value if what == PROCESSES else 1
        port = free_port()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, step)
            side = functools.partial(one_of, rank=0, processes=processes, port=port, folder=folder, step=step)
            point = f"{what} {value}"
            with followers(processes, port, folder, step):
                found = alternate({point: side}, runs, bare={point: bare_mib})
        entries += [{**run, "growing": what, "value": value} for run in found]
    return entries


def order_of_growth(small: tuple[float, float], large: tuple[float, float]) -> float:
    """The exponent of a power law through two points.

    Args:
        small: A point (x, y).
        large: Another.

    Returns:
        The slope of their logarithms.

    Example:
        >>> order_of_growth((1, 3), (10, 300))
        2.0
    """
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def growth(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Orders of growth of all that was measured.

    Args:
        runs: What `measure` returns, of one or more things that grow.

    Returns:
        Name, as in "seconds by batch", -> exponent.
    """
    found = {}
    for name, (what, field) in RATIOS.items():
        values = sorted({run["value"] for run in runs if run["growing"] == what})
        if len(values) > 1:
            ends = [(float(value), median_of(runs, f"{what} {value}", field)) for value in (values[0], values[-1])]
            found[name] = order_of_growth(*ends)
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Time and memory of every point, and how often they are those of the first point.

    Args:
        runs: What `measure` returns.

    Returns:
        A Markdown table.
    """
    phases = dict.fromkeys(phase for run in runs for phase in run["phases"])
    rows: list[dict[str, Any]] = []
    first: dict[str, tuple[float, float, float]] = {}
    for what, value in dict.fromkeys((run["growing"], run["value"]) for run in runs):
        side = f"{what} {value}"
        parts = {f"{phase} s": median_of(runs, side, "phases", phase) for phase in phases}
        seconds, memory = (median_of(runs, side, field) for field in ("seconds", "peak_mib"))
        point = (value, seconds, memory)
        grown = [new / old for new, old in zip(point, first.setdefault(what, point), strict=True)]
        rows.append(
            {
                "growing": what,
                "value": value,
                "times the first": grown[0],
                "s per step": seconds,
                "times the first's s": grown[1],
                "peak MiB": memory,
                "times the first's MiB": grown[2],
                **parts,
            }
        )
    return markdown(rows)


def main(words: Sequence[str]) -> None:
    """Measure, and print the tables.

    Args:
        words: The command line without the program's name.
    """
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROWING, default=list(GROWING), help="what shall grow")
    options = parser.parse_args(words)
    quiet()
    start = Step(SMALL, lengths=(0,) * 4, response_length=32, micro_batch=2, steps=steps_needed(options.runs))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), points("batch", (4,), start)[4])
        say(describe(SMALL, Path(folder) / "base"))
    runs = []
    with returning_freed_memory():
        bare_mib = bare(points("batch", (4,), start)[4])
        for what in options.only:
            runs += measure(what, points(what, GROWING[what], start), options.runs, bare_mib)
    orders = growth(runs)
    print(table(runs), end="\n\n")
    print(markdown([{"what grows by what": name, "order": order} for name, order in orders.items()]))
    if options.json is not None:
        write_json(options.json, orders, runs)


if __name__ == "__main__":
    main(sys.argv[1:])
