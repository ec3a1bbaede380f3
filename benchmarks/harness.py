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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import patch_environment
from transformers.utils import logging as transformers_logging

from benchmarks.gate import Gate
from benchmarks.workload import TOY, describe

Side = Callable[[Gate], None]
"""Builds a trainer that has the gate among its callbacks, and trains; must be picklable."""


def alternate(
    sides: Mapping[str, Side], runs: int, *, count: Sequence[str] = (), bare: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Let the sides take one step each in turn, `runs` times after a first time that is thrown away.

    Args:
        sides: Name -> side. Each must be able to take `steps_needed(runs)` steps.
        runs: How many steps of each side count.
        count: Sides whose floating-point operations are counted, in the step whose time is thrown away.
        bare: Name -> MiB that are no part of the side's own, as `bare_memory` finds them; 0 where it is not there.

    Returns:
        One entry per counted step: `run` (from 1), `side`, `seconds`, `cpu_seconds` (of all threads), `peak_mib` over
        the bare process, `held_mib` of that before the step, `peaks` (phase -> MiB), `phases` (phase -> seconds).
        Before them one per side in `count`, whose `run` is "counted" and which has `flops` by phase.

    Raises:
        RuntimeError: If a side fails; with its traceback.
    """
    with contextlib.ExitStack() as started:  # one by one, so that building does not disturb building
        pipes = {
            name: started.enter_context(_process(name, side, (bare or {}).get(name, 0.0)))
            for name, side in sides.items()
        }
        measured = []
        for run in range(runs + 1):
            for name, pipe in pipes.items():
                counted = not run and name in count
                step = _turn(name, pipe, "count" if counted else "go")
                say(f"run {run or 'to warm up'}: {name} {step['seconds']:.2f} s, {step['peak_mib']:.0f} MiB")
                if run or counted:
                    measured.append({"run": run or "counted", "side": name, **step})
        return measured


def bare_memory(name: str, side: Side) -> float:
    """What a process takes that has imported and run everything, but holds no model to speak of.

    Libraries are imported, and their pages read, up to the end of the first step.

    Args:
        name: For messages.
        side: A side with a model of no size, that can take two steps.

    Returns:
        MiB that are resident after its first step.

    Raises:
        RuntimeError: If the side fails; with its traceback.
    """
    with _process(name, side, 0.0) as pipe:
        found = _turn(name, pipe, "go")["resident_mib"]
    say(f"{name}: the bare process takes {found:.0f} MiB")
    return found


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Let processes that are started inside give memory back to the system once it is free.

    glibc keeps freed blocks of up to 32 MiB for the next ones that fit. What a step leaves behind so, several times
    its tensors, depends on the order in which blocks came and went, not on what was in use. It costs time: for
    measurements of memory alone.

    Yields:
        Nothing.
    """
    with patch_environment(MALLOC_MMAP_THRESHOLD_=1 << 16):
        yield


def side_by_side(
    step: Any,
    prepare: Callable[[Path, Any], None],
    sides: Mapping[str, functools.partial[None]],
    runs: int,
    *,
    count: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Say what is measured, and `alternate` between sides that load the same files.

    Args:
        step: What a step does, a benchmark's dataclass with a `size`.
        prepare: Writes the files for a step into a folder; the base model as `base`.
        sides: Name -> a side with its `step`, which takes the folder as `folder` too.
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
        toys = {key: functools.partial(side, folder=folder / "toy", step=toy_of(side)) for key, side in sides.items()}
        prepare(folder / "toy", replace(step, size=TOY))
        bare = {key: bare_memory(key, side) for key, side in toys.items()}
        here = {key: functools.partial(side, folder=folder) for key, side in sides.items()}
        return alternate(here, runs, count=count, bare=bare)


def toy_of(side: functools.partial[None]) -> Any:
    """A side's step with a model of no size.

    Args:
        side: A side with its `step`.

    Returns:
        The step.
    """
    return replace(side.keywords["step"], size=TOY)


def steps_needed(runs: int) -> int:
    """How many steps a side must be able to take.

    Args:
        runs: How many count.

    Returns:
        With the first, which warms up, and one that never begins: a trainer that has come to its end would save its
        model in another side's turn.
    """
    return runs + 2


@contextlib.contextmanager
def _process(name: str, side: Side, bare_mib: float) -> Iterator[Connection]:
    """A side's process, which waits for its first turn."""
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=_serve, args=(child, side, bare_mib), daemon=True)
    process.start()
    child.close()
    try:
        _receive(name, pipe)
        yield pipe
    finally:
        process.kill()  # not terminate: a trainer takes SIGTERM as the wish for a last checkpoint
        process.join()


def _serve(pipe: Connection, side: Side, bare_mib: float) -> None:
    """What a side's process runs; what its trainer logs goes nowhere."""
    quiet()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            side(Gate(pipe, bare_mib))
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
