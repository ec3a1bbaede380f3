"""What surrounds `accelerate launch`: its configurations by name, its signals, and the command that resumes a run."""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import yaml

from trl_llava.configs.shipped import find_shipped, shipped_folder
from trl_llava.errors import RecipeError

LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"
"""For torchrun's `signals_to_handle`: on those that it handles, it kills its processes after 30 seconds."""
COMMAND_VARIABLE = "TRL_LLAVA_COMMAND"
"""Set by the `trl-llava` command for the processes it launches: its own command line, as JSON."""
_OPTION = "--resume_from_checkpoint"


def accelerate_config_names() -> list[str]:
    """The names of the launch configurations that come with the package."""
    return sorted(path.stem for path in shipped_folder("accelerate_configs").glob("*.yaml"))


def find_accelerate_config(name: str) -> Path:
    """The launch configuration of this name: a file, or one that came with the package."""
    for path in (find_shipped(name), shipped_folder("accelerate_configs") / f"{name}.yaml"):
        if path.is_file():
            return path
    raise RecipeError(f"--accelerate_config {name}: neither a file nor one of {', '.join(accelerate_config_names())}.")


def start_all_processes(options: argparse.Namespace) -> None:
    """Make the launcher start all of `--num_processes`; where nothing says how, it would silently start one."""
    from accelerate.commands.config.config_args import default_config_file

    ways = ("multi_gpu", "cpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    if (options.num_processes or 1) < 2 or any(getattr(options, way) for way in ways):
        return
    config = Path(options.config_file or default_config_file)
    if not config.is_file():
        options.multi_gpu = True  # its name for torchrun, on CPUs too
    elif yaml.safe_load(config.read_text(encoding="utf-8")).get("distributed_type") in ("NO", False, None):
        raise RecipeError(
            f"--num_processes {options.num_processes}: {config} is for one process (`distributed_type: NO`). Use "
            "another one, such as `--accelerate_config ddp`."
        )


@contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` take SIGTERM and Ctrl-C in the block, if Python allows it: only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)


@contextmanager
def signals_passed_on() -> Iterator[list[int]]:
    """Pass SIGTERM and Ctrl-C to the child processes and wait until they have saved; yields the signals received.

    `accelerate launch` itself leaves its one process behind when it is terminated, and kills several after 30 seconds.
    """
    received: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if signum == signal.SIGTERM:  # a run that is starting up says nothing; no `print`: see signals.py
            os.write(2, b"\nSIGTERM: ending the run\n")
        for child in psutil.Process().children():
            # The terminal has already sent Ctrl-C to those of our own group; once more would mean to stop at once.
            # SIGTERM reaches them too if it was this process alone that was interrupted.
            has_it = signum == signal.SIGINT and os.getpgid(child.pid) == os.getpgrp()
            child.send_signal(signal.SIGTERM if has_it else signum)
        for name in list(logging.root.manager.loggerDict):  # torchrun would log the end of its processes as a failure
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)

    with signals_handled(pass_on):
        yield received


def launched_by_accelerate() -> bool:
    """Whether `accelerate launch` has started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def resume_command() -> str:
    """The command line that resumes this run, or the argument of `train` where no entry point is running."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not str(spec.name).startswith("trl_llava.train_"):
        return "`resume_from_checkpoint=True`"
    return shlex.join(with_resume(_command_line()))


def with_resume(words: Sequence[str]) -> list[str]:
    """The command line with `--resume_from_checkpoint` for whatever it has of that option."""
    kept, pending = [], [word.replace("--resume-from-checkpoint", _OPTION, 1) for word in words]
    while pending:
        word = pending.pop(0)
        if word == _OPTION:
            if pending and not pending[0].startswith("--"):
                pending.pop(0)
        elif not word.startswith(f"{_OPTION}="):
            kept.append(word)
    return [*kept, _OPTION]


def _command_line() -> list[str]:
    if COMMAND_VARIABLE in os.environ:
        return [str(word) for word in json.loads(os.environ[COMMAND_VARIABLE])]
    launcher = Path(f"/proc/{os.getppid()}/cmdline")  # Linux
    if launched_by_accelerate() and launcher.is_file():
        words = launcher.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        if any("accelerate" in word for word in words):
            return words
    return list(sys.orig_argv)
