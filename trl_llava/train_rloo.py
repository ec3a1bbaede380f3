"""Instead of stage 3: TRL's RLOO with the factual reward, which sees the image and reads its captions.

In:  a base model with or without stage 1's adapter, stage 2's reward model or reward functions of your own, and the
     rows of PPO (`prompt` and `images`, where there are any with `captions` and `answer_type`).
Out: `output_dir` with the adapter (or model), processor, trainer state, recipe.yaml, versions.json and a model card.

    accelerate launch -m trl_llava.train_rloo --config recipes/llava-1.5-7b-hf/rloo.yaml [--field value ...]
"""

import sys
from collections.abc import Sequence

from trl import RLOOConfig, RLOOTrainer

from trl_llava.configs.recipe import RecipeParser
from trl_llava.online_rl import online_parser, run_online
from trl_llava.run.console import run_as_program


def make_parser(prog: str | None = None) -> RecipeParser:
    """The parser of these recipes.

    Args:
        prog: Name of the command in `--help`.

    Returns:
        The parser.
    """
    return online_parser(RLOOConfig, prog)


def main(args: Sequence[str] | None = None) -> RLOOTrainer:
    """Runs the training.

    Args:
        args: Command line without the program's name; by default that of the process.

    Returns:
        The trainer, after training and saving.

    Raises:
        RecipeError: If the recipe cannot be used.
        OutputDirError: If `output_dir` cannot be written or belongs to another run.
        RowError: If a row cannot be used.
    """
    return run_online("rloo", RLOOConfig, RLOOTrainer, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    run_as_program(main)
