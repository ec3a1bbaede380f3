"""What an entry point shows at the terminal, besides the training itself."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import datasets
import torch
from tqdm.std import tqdm
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from trl_llava.errors import ExplainedError

SECONDS_FOR_THE_LAUNCHER = 2.0
"""How long a process that has lost another waits to be ended, so that the launcher sees the other's failure first."""


def _is_no_guess(record: logging.LogRecord) -> bool:
    """Keep out what DeepSpeed says on every machine without a GPU, where nobody has asked for DeepSpeed."""
    return "Setting accelerator to CPU" not in str(record.msg)


logging.getLogger("DeepSpeed").addFilter(_is_no_guess)  # before anything imports it


def quiet_libraries(args: TrainingArguments) -> None:
    """Turn the libraries' progress bars off with `disable_tqdm`, and on all processes but the first."""
    if args.disable_tqdm or args.process_index > 0:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def run_as_program(main: Callable[[], Any]) -> None:
    """Run an entry point and end the process; an error that explains itself is printed without a traceback.

    One of several processes that fails says why and ends at once: it waits for no other, which may be waiting for it,
    and the launcher then ends those.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    which = f" (process {os.environ.get('RANK', '0')} of {os.environ['WORLD_SIZE']})" if several else ""
    try:
        main()
    except KeyboardInterrupt:  # before the training, or twice in it
        _end_bars()
        print("stopped at once; the last checkpoint, if there is one, is whole", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ExplainedError as error:
        _end_bars()
        print(f"error{which}: {error}", file=sys.stderr)
        _end(error.exit_status, several)
    except Exception as error:
        if not several:
            raise
        if _lost_another(error):
            print(f"this process{which} stops: another one has ended and says why", file=sys.stderr)
            time.sleep(SECONDS_FOR_THE_LAUNCHER)
        else:
            print(f"fault{which}:\n{traceback.format_exc()}", file=sys.stderr)
        _end(1, several)
    if torch.distributed.is_initialized():  # its threads would abort a process that just ends
        torch.distributed.destroy_process_group()


def _end_bars() -> None:
    """Leave the line of a progress bar, or the message would stand behind the bar and be drawn over."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _lost_another(error: Exception) -> bool:
    """Whether this is what a collective raises when another process is gone; gloo raises a plain RuntimeError."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _end(status: int, several: bool) -> None:
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the usual way runs destructors, and those of a process group wait for the others
    sys.exit(status)
