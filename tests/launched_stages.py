"""What each process of a launched test runs: the stages of a plan one after another, through their real entry points.

accelerate launch ... tests/launched_stages.py PLAN.json

The plan is a list of `[stage, [word, ...]]`. What comes out lies in the `output_dir` that the words name.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from accelerate import PartialState

from trl_llava.console import run_as_program
from trl_llava.rows import RowError


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that the plan's words can name: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def failing_on_the_second(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that ends process 1 with an error that explains itself, at a time that it writes down."""
    if PartialState().process_index == 1:
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        raise RowError("rows.json[3]", "its picture is gone", "Leave the row out")
    return even_tokens(completion_ids)


def without_operations_of_inference() -> None:
    """Keep DeepSpeed from compiling, before its first run on CPUs, an operation that its training has no use for.

    That takes a compiler and minutes, and one that was killed at it leaves a lock that all later ones wait for.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}


def main(plan: str) -> None:
    without_operations_of_inference()
    for stage, words in json.loads(Path(plan).read_text()):
        importlib.import_module(f"trl_llava.train_{stage}").main(words)
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1]))
