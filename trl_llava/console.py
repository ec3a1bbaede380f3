"""What a person at the terminal sees of an entry point, besides the training itself."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import datasets
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from trl_llava.errors import ExplainedError


def quiet_libraries(args: TrainingArguments) -> None:
    """Turns the libraries' progress bars off where nobody reads them.

    Args:
        args: Their `disable_tqdm` decides; processes other than the first are always quiet.
    """
    if args.disable_tqdm or args.process_index > 0:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def run_as_program(main: Callable[[], Any]) -> None:
    """Runs an entry point and ends the process.

    Args:
        main: The entry point. An error that explains itself is printed without a traceback, and gives the exit status;
            any other is a fault, whose traceback is needed. Ctrl-C before the training, or twice in it, needs none.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint, if there is one, is whole", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ExplainedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
