"""Sides of a measurement: each trains in a process of its own, one step at a time, in turn with the others.

Times are comparable because the sides alternate on one machine; peak memory is a side's own because nothing else lives
in its process. The first step of each side, which pays for warming up, is run and thrown away.
"""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
from transformers.utils import logging as transformers_logging

from benchmarks.gate import Gate
from benchmarks.workload import Size, describe

Side = Callable[[Gate], None]
"""Builds a trainer that has the gate among its callbacks, and trains; must be picklable."""


def alternate(sides: Mapping[str, Side], runs: int, *, count: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Let the sides take one step each in turn, `runs` times after a first time that is thrown away.

    Args:
        sides: Name -> side. Each must be able to take `steps_needed(runs)` steps.
        runs: How many steps of each side count.
        count: Sides that take one more step at the end, in which floating-point operations are counted.

    Returns:
        One entry per counted step: `run` (from 1), `side`, `seconds`, `cpu_seconds` (of all threads), `peak_mib` over
        the bare process, `phases` (name -> seconds). Then one per side in `count`, whose
        `run` is "counted" and which has `flops` by phase.

    Raises:
        RuntimeError: If a side fails; with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, side in sides.items():  # one by one, so that building does not disturb building
            pipes[name], child = context.Pipe()
            process = context.Process(target=_serve, args=(child, side), daemon=True)
            process.start()
            processes.append(process)
            child.close()
            bare = _receive(name, pipes[name])["bare_mib"]
            say(f"{name}: ready; the bare process takes {bare:.0f} MiB")
        measured = []
        for run in range(runs + 1):
            for name, pipe in pipes.items():
                step = _turn(name, pipe, "go")
                say(f"run {run or 'to warm up'}: {name} {step['seconds']:.2f} s, {step['peak_mib']:.0f} MiB")
                if run:
                    measured.append({"run": run, "side": name, **step})
        for name in count:
            measured.append({"run": "counted", "side": name, **_turn(name, pipes[name], "count")})
        return measured
    finally:
        for process in processes:
            process.kill()  # not terminate: a trainer takes SIGTERM as the wish for a last checkpoint
            process.join()


class Work(Protocol):
    """What a step does: a frozen dataclass of a benchmark."""

    @property
    def size(self) -> Size:
        """The models."""


W = TypeVar("W", bound=Work)


def side_by_side(
    step: W,
    prepare: Callable[[Path, W], None],
    sides: Mapping[str, Callable[..., None]],
    runs: int,
    *,
    count: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Say what is measured, and `alternate` between sides that load the same files.

    Args:
        step: What a step does.
        prepare: Writes the files into a temporary folder; the base model as `base`.
        sides: Name -> a side, but that it takes that folder as `folder` too.
        runs: As for `alternate`.
        count: As for `alternate`.

    Returns:
        What `alternate` returns.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, step)
        say(describe(step.size, folder / "base"))
        say(f"{step}")
        return alternate(
            {key: functools.partial(side, folder=folder) for key, side in sides.items()}, runs, count=count
        )


def steps_needed(runs: int) -> int:
    """How many steps a side must be able to take.

    Args:
        runs: How many count.

    Returns:
        With the first, which warms up, the one whose operations are counted, and one that never begins: a trainer
        that has come to its end would save its model in another side's turn.
    """
    return runs + 3


def _serve(pipe: Connection, side: Side) -> None:
    """What a side's process runs; what its trainer logs goes nowhere."""
    quiet()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            side(Gate(pipe))
    except Exception:
        pipe.send({"failed": traceback.format_exc()})


def _turn(name: str, pipe: Connection, word: str) -> dict[str, Any]:
    pipe.send(word)
    return _receive(name, pipe)


def _receive(name: str, pipe: Connection) -> dict[str, Any]:
    try:
        message = pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"{name}: its process ended without a word, as when memory runs out") from error
    if "failed" in message:
        raise RuntimeError(f"{name} failed:\n{message['failed']}")
    return message


def quiet() -> None:
    """Keep what the libraries say while they load models out of a benchmark's output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*trl.experimental.*")


def say(text: str) -> None:
    """Show progress at once, also where output goes to a file.

    Args:
        text: One line.
    """
    print(text, flush=True)
