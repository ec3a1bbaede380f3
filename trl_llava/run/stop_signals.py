"""SIGTERM and Ctrl-C: a run finishes its step, saves, and says how it goes on."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

from trl_llava.run.worker_signals import workers_shielded

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_PRESS = 1.0
"""Seconds within which a second SIGINT is the same press: the terminal and the launcher both pass it on."""


class Stopped(SystemExit):
    """A run that was asked to stop, has saved, and ends; nobody prints a traceback for it.

    Args:
        signum: The signal; the exit status is 128 more, as shells have it.
        message: What was said to the user.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Remembers a request to stop until a step has ended; a second Ctrl-C stops at once.

    Args:
        accelerator: Knows the processes, which must agree on the step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.process = os.getpid()
        self.launcher = os.getppid() if launched_by_accelerate() else None
        self.received = 0
        self.agreed = 0
        self.pressed: float | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals over for as long as the block runs.

        In a thread other than the first, where Python allows no handlers, they keep their usual meaning.

        Yields:
            Nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            with workers_shielded():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def agree(self) -> bool:
        """Ask all processes, at the end of a step, whether one of them was told to stop.

        Returns:
            `True` on every process, or on none.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.received = self.received or signal.SIGTERM  # `accelerate launch` was killed and passed nothing on
        received = torch.tensor([self.received], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            received = self.accelerator.gather(received).max()
        self.agreed = int(received.item())
        return self.agreed > 0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data loader's worker, forked with this handler: its parent decides
            return
        if signum == signal.SIGINT and self.pressed is not None:
            if time.monotonic() - self.pressed < _ONE_PRESS:
                return
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if signum == signal.SIGINT:
            self.pressed = time.monotonic()
        if not self.received and self.accelerator.is_main_process:
            # Not `print`: a handler may run in the middle of another print.
            at_once = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            text = f"\n{signal.Signals(signum).name}: finishing this step, then saving{at_once}\n"
            os.write(2, text.encode())
        self.received = self.received or signum


def launched_by_accelerate() -> bool:
    """Whether `accelerate launch` has started this process.

    Returns:
        `True` if so.
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ
