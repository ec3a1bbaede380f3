"""A side's end of a measurement: holds a trainer between its steps, and measures each step and its phases."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB_PER_KIB = 1 / 1024


class Gate(TrainerCallback):
    """A side's end of the measurement: holds its trainer before each step until it is this side's turn."""

    def __init__(self, pipe: Connection, bare_mib: float = 0.0) -> None:
        """Take note of what is no part of a side's own.

        Args:
            pipe: To the process that gives the turns.
            bare_mib: What a process like this takes that has done a step with a model of no size.
        """
        self.pipe = pipe
        self.bare_mib = bare_mib
        self.counter: FlopCounterMode | None = None
        self.phases: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first turn."""
        self.pipe.send({"ready": True})
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report the step, and wait for the next turn."""
        self.report()
        self.wait()

    def wait(self) -> None:
        """Hold until it is this side's turn."""
        turn = self.pipe.recv()
        for found in (self.phases, self.peaks, self.flops):
            found.clear()
        if turn == "count":
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()  # left in `report`: the step lies between two calls of this callback
        _start_peak_again()
        self.held_mib, self.reserved_mib = held_mib() - self.bare_mib, 0.0
        self.start, self.cpu_start = _now(), time.process_time()

    def report(self) -> None:
        """Send what the step took."""
        seconds = _now() - self.start
        self.note_peak("rest")
        step = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_mib": max(self.peaks.values()),
            "held_mib": self.held_mib,
            "peaks": dict(self.peaks),
            "resident_mib": held_mib(),
            "phases": {**self.phases, "rest": seconds - sum(self.phases.values())},
        }
        if torch.cuda.is_available():
            step["gpu_mib"] = self.reserved_mib
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
        self.note_peak("rest")
        start = _now()
        yield
        self.phases[name] += _now() - start
        self.note_peak(name)
        if self.counter is not None:
            self.flops[name] += self.counter.get_total_flops() - before

    def note_peak(self, name: str) -> None:
        """Note the peak of memory since the last call of this, and let it start again from what is resident now.

        Args:
            name: What has been done since.
        """
        self.peaks[name] = max(self.peaks[name], _peak_mib() - self.bare_mib)
        if torch.cuda.is_available():
            self.reserved_mib = max(self.reserved_mib, torch.cuda.max_memory_reserved() / 2**20)
        _start_peak_again()

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

        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
            # All sides take the rows as they lie: a step's batch is known.
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    return Gated


def _now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def held_mib() -> float:
    """What is held now.

    Returns:
        MiB: of the GPU's memory where there is one, else resident memory of this process.
    """
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else memory_mib("VmRSS")


def _peak_mib() -> float:
    """The most that was held since `_start_peak_again`."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory_mib("VmHWM")


def _start_peak_again() -> None:
    """Let peaks start from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_REFS.write_text("5")


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
