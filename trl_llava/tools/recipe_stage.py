"""Which stage a recipe is for."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

from trl_llava.errors import RecipeError

STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "rloo")


def find_stage(words: Sequence[str]) -> str:
    """Find out which stage a recipe is for.

    Args:
        words: The command line.

    Returns:
        The stage: the first word of the file's name, or the only one that knows all keys.

    Raises:
        RecipeError: If several or none do, or there is no such file.
    """
    path = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"), "")
    path = next((word.partition("=")[2] for word in words if word.startswith("--config=")), path)
    if path and not os.path.isfile(path):
        raise RecipeError(f"cannot read the recipe {path}: there is no such file.")
    first = os.path.basename(path).split(".")[0].split("_")[0]
    if first in STAGES:
        return first
    fitting = []
    for stage in STAGES:
        try:
            recipe_parser(stage).check(words)
        except RecipeError:
            continue
        fitting.append(stage)
    if len(fitting) != 1:
        known = f"fits {' and '.join(fitting)}" if fitting else f"fits none of {', '.join(STAGES)}"
        recipe = path or "without --config, the command line"
        raise RecipeError(f"{recipe} {known}: say with --stage which one it is for.")
    return fitting[0]


def recipe_parser(stage: str) -> Any:
    """The parser of a stage's recipes.

    Args:
        stage: Name of the stage.

    Returns:
        What `make_parser` of the stage's entry point returns.
    """
    return importlib.import_module(f"trl_llava.train_{stage}").make_parser(f"trl-llava check-data ({stage})")
