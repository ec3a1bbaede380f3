"""What each process of a launched test runs: the stages of a plan one after another, through their real entry points.

accelerate launch ... tests/launched_stages.py PLAN.json

The plan is a list of `[stage, [word, ...]]`. What comes out lies in the `output_dir` that the words name.
"""

import importlib
import json
import sys
from pathlib import Path

from accelerate import PartialState

from trl_llava.console import run_as_program


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that the plan's words can name: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def main(plan: str) -> None:
    for stage, words in json.loads(Path(plan).read_text()):
        importlib.import_module(f"trl_llava.train_{stage}").main(words)
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1]))
