"""SIGTERM to all processes of a run at once: the workers of its data loaders stay until their own process ends them.

Schedulers and `kill` of a process group send it so. A worker of torch's dies of it, and its death is an error in the
process that wants to finish its step.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_shielding = False


@contextmanager
def workers_shielded() -> Iterator[None]:
    """Let processes that are forked in the block, as workers are, take SIGTERM from their parent alone.

    Yields:
        Nothing.
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
        threading.Thread(target=_end_when_told, args=[os.getppid()], daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_in_child)
