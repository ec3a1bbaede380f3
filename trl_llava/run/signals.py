"""SIGTERM and Ctrl-C: a run finishes its step, saves, and says how to resume it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

from trl_llava.run.launch import launched_by_accelerate, signals_handled

_ONE_PRESS = 1.0
"""Seconds within which a second SIGINT is the same press: the terminal and the launcher both pass it on."""


class Stopped(SystemExit):
    """A run that got a signal, has saved, and ends without a traceback, with exit status 128 + signal as in shells."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """Remembers a signal until the step has ended; a second Ctrl-C stops at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.process = os.getpid()
        self.launcher = os.getppid() if launched_by_accelerate() else None
        self.received = 0  # signal number, in this process
        self.agreed = 0  # signal number, the same in all
        self.pressed: float | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remember the signals that come in the block."""
        with signals_handled(self._note), workers_shielded():
            yield

    def agree(self) -> bool:
        """Whether any process has got a signal: the same on all of them, which call this at the end of a step."""
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
            at_once = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            # Not `print`: a handler may run in the middle of another print.
            os.write(2, f"\n{signal.Signals(signum).name}: finishing this step, then saving{at_once}\n".encode())
        self.received = self.received or signum


_shielding = False


@contextmanager
def workers_shielded() -> Iterator[None]:
    """Let processes that are forked in the block, such as data loaders' workers, take SIGTERM from their parent alone.

    Schedulers send it to all processes of a run at once. A worker would die of it, and its death be an error in the
    process that wants to finish its step.
    """
    global _shielding
    before, _shielding = _shielding, hasattr(signal, "sigwaitinfo")  # macOS has it not
    try:
        yield
    finally:
        _shielding = before


def _in_child() -> None:
    if _shielding:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for all threads that are still to come
        threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_in_child)
