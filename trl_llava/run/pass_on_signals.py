"""What a launcher does with SIGTERM and Ctrl-C: its processes get them, and it waits until they have saved.

`accelerate launch` itself leaves its one process behind when it is terminated, and gives several processes 30 seconds.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"
"""For its `signals_to_handle`: on those that it handles, it kills its processes after 30 seconds."""


@contextmanager
def signals_passed_on() -> Iterator[list[int]]:
    """Hand signals to the child processes instead of ending.

    Yields:
        The signals received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for child in psutil.Process().children():
            # The terminal has already told those of our own group; to them, Ctrl-C again would mean to stop at once.
            # SIGTERM reaches them too if it was this process alone that was interrupted.
            told = signum == signal.SIGINT and os.getpgid(child.pid) == os.getpgrp()
            child.send_signal(signal.SIGTERM if told else signum)
        for name in list(logging.root.manager.loggerDict):  # it would call what has been asked for a failure
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
