"""Sides of a measurement: each trains in a process of its own, one step at a time, in turn with the others.

Times are comparable because the sides alternate on one machine; peak memory is a side's own because nothing else lives
in its process. The first step of each side, which pays for warming up, is run and thrown away.
"""

import contextlib
import multiprocessing
import os
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB_PER_KIB = 1 / 1024


class Gate(TrainerCallback):
    """A side's end of the measurement: holds its trainer before each step until it is this side's turn."""

    def __init__(self, pipe: Connection) -> None:
        """Note what the process takes before it has made anything.

        Args:
            pipe: To the process that gives the turns.
        """
        self.pipe = pipe
        self.bare_mib = memory_mib("VmRSS")
        self.counter: FlopCounterMode | None = None
        self.phases: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first turn."""
        self.pipe.send({"bare_mib": self.bare_mib})
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report the step, and wait for the next turn."""
        self.report()
        self.wait()

    def wait(self) -> None:
        """Hold until it is this side's turn."""
        turn = self.pipe.recv()
        self.phases.clear()
        self.flops.clear()
        if turn == "count":
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()  # left in `report`: the step lies between two calls of this callback
        CLEAR_REFS.write_text("5")  # the peak of resident memory starts again from what is resident now
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start, self.cpu_start = _now(), time.process_time()

    def report(self) -> None:
        """Send what the step took."""
        seconds = _now() - self.start
        step = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_mib": memory_mib("VmHWM") - self.bare_mib,
            "phases": {**self.phases, "rest": seconds - sum(self.phases.values())},
        }
        if torch.cuda.is_available():
            step["gpu_mib"] = torch.cuda.max_memory_reserved() / 2**20
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            total = float(self.counter.get_total_flops())
            step["flops"] = {**self.flops, "rest": total - sum(self.flops.values())}
            self.counter = None
        self.pipe.send(step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the step.

        Args:
            name: What it does; parts of one name add up.

        Yields:
            Nothing.
        """
        before = self.counter.get_total_flops() if self.counter is not None else 0
        start = _now()
        yield
        self.phases[name] += _now() - start
        if self.counter is not None:
            self.flops[name] += self.counter.get_total_flops() - before

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are measured as a phase.

        Args:
            name: The phase.
            function: Any function.

        Returns:
            It, with the same signature.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call


def gated(trainer_class: type[Trainer], gate: Gate) -> type[Trainer]:
    """A trainer whose steps wait at a gate, and whose phases are measured.

    Args:
        trainer_class: A trainer of transformers' kind, whose loss is `compute_loss`.
        gate: The gate.

    Returns:
        A subclass of it that behaves alike.
    """

    class Gated(trainer_class):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[gate], **kwargs)
            self.data_collator = gate.timed("data", self.data_collator)
            self.compute_loss = gate.timed("forward", self.compute_loss)
            self.accelerator.backward = gate.timed("backward", self.accelerator.backward)

    return Gated


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


def steps_needed(runs: int) -> int:
    """How many steps a side must be able to take.

    Args:
        runs: How many count.

    Returns:
        With the first, which warms up, the one whose operations are counted, and one that never begins: a trainer
        that has come to its end would save its model in another side's turn.
    """
    return runs + 3


def _now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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


def memory_mib(field: str) -> float:
    """Memory of this process.

    Args:
        field: "VmRSS" for what is resident, "VmHWM" for the peak of that.

    Returns:
        MiB.

    Raises:
        RuntimeError: If this is not Linux, the only system that lets a process reset its peak.
    """
    if not STATUS.exists():
        raise RuntimeError("the benchmarks read memory from /proc, which only Linux has")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * MIB_PER_KIB


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
