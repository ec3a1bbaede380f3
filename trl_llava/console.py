"""What a person at the terminal sees of an entry point, besides the training itself."""

import sys
from collections.abc import Callable
from typing import Any

import datasets
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from trl_llava.health import UnhealthyRunError
from trl_llava.output_dir import OutputDirError
from trl_llava.recipe_values import RecipeError
from trl_llava.rows import RowError

# These say what to do about them; anything else is a fault, and its traceback is needed.
EXPLAINED = (RecipeError, OutputDirError, RowError, UnhealthyRunError, OSError)


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
        main: The entry point; an error that explains itself is printed without a traceback.
    """
    try:
        main()
    except EXPLAINED as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
