"""The command that goes on with a run."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_llava.run.stop_signals import launched_by_accelerate

COMMAND_VARIABLE = "TRL_LLAVA_COMMAND"
"""Set by the `trl-llava` command for the processes it launches: its own words, as JSON."""
_OPTION = "--resume_from_checkpoint"


def resume_command() -> str:
    """How the user goes on with this run.

    Returns:
        The command line this run was started with plus `--resume_from_checkpoint`, or what to call where no entry
        point is running.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not str(spec.name).startswith("trl_llava.train_"):
        return "`resume_from_checkpoint=True`"
    return shlex.join(with_resume(_started_with()))


def with_resume(words: Sequence[str]) -> list[str]:
    """A command line that resumes.

    Args:
        words: The one that started the run.

    Returns:
        The same with `--resume_from_checkpoint` for whatever it said about that before.
    """
    kept, pending = [], list(words)
    while pending:
        word = pending.pop(0)
        if word == _OPTION or word == _OPTION.replace("_", "-"):
            if pending and not pending[0].startswith("--"):
                pending.pop(0)
        elif not word.startswith((f"{_OPTION}=", f"{_OPTION.replace('_', '-')}=")):
            kept.append(word)
    return [*kept, _OPTION]


def _started_with() -> list[str]:
    if COMMAND_VARIABLE in os.environ:
        return [str(word) for word in json.loads(os.environ[COMMAND_VARIABLE])]
    launcher = Path(f"/proc/{os.getppid()}/cmdline")  # Linux
    if launched_by_accelerate() and launcher.is_file():
        words = launcher.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        if any("accelerate" in word for word in words):
            return words
    return list(sys.orig_argv)
