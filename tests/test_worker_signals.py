"""A worker of a data loader lives through a SIGTERM that is meant for its process, and ends when that says so."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from trl_llava.run.signals import workers_shielded

FORK = multiprocessing.get_context("fork")


def work(pipe: Connection) -> None:
    pipe.send("here")
    pipe.recv()  # as a worker waits for the next rows


@pytest.mark.parametrize("shielded", [True, False])
def test_sigterm_of_another_process(shielded: bool) -> None:
    ours, theirs = FORK.Pipe()
    worker = FORK.Process(target=work, args=[theirs], daemon=True)
    if shielded:
        with workers_shielded():
            worker.start()
    else:
        worker.start()
    assert ours.recv() == "here"
    stranger = FORK.Process(target=os.kill, args=[worker.pid, signal.SIGTERM])
    stranger.start()
    stranger.join()
    worker.join(0.3)
    assert worker.is_alive() is shielded
    before = time.monotonic()
    worker.terminate()
    worker.join(5)
    assert not worker.is_alive() and time.monotonic() - before < 2
