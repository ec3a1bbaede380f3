"""Instead of stages 2 and 3: TRL's DPO on the rows that the reward model is trained on, captions unused.

In:  a base model with or without stage 1's adapter, and rows with `prompt`, `chosen`, `rejected` and `images`.
Out: `output_dir` with the adapter (or model), processor, trainer state, recipe.yaml, versions.json and a model card.

    accelerate launch -m trl_llava.train_dpo --config recipes/llava-1.5-7b-hf/dpo.yaml [--field value ...]
"""

import sys
from collections.abc import Sequence

from transformers import set_seed
from trl import DatasetMixtureConfig, DPOTrainer

from trl_llava.configs.online import LlavaDPOConfig
from trl_llava.configs.recipe import RecipeParser
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.preference_collators import DPOCollator
from trl_llava.data.splits import load_splits
from trl_llava.models.policy_start import load_policy_start, load_recipe_processor
from trl_llava.publish.trainer import PushesSafely
from trl_llava.run.console import run_as_program
from trl_llava.run.safe_checkpoints import SafeCheckpoints
from trl_llava.stage_run import begin


class LlavaDPOTrainer(SafeCheckpoints, PushesSafely, DPOTrainer):
    """TRL's `DPOTrainer` with checkpoints that survive a kill, and that a run goes on from."""

    stage = "dpo"


def make_parser(prog: str | None = None) -> RecipeParser:
    """The parser of these recipes.

    Args:
        prog: Name of the command in `--help`.

    Returns:
        The parser.
    """
    return RecipeParser((LlavaScriptArguments, LlavaDPOConfig, LlavaModelConfig, DatasetMixtureConfig), prog=prog)


def main(args: Sequence[str] | None = None) -> DPOTrainer:
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
    words = sys.argv[1:] if args is None else args
    script_args, training_args, model_args, mixture, recipe = make_parser("train_dpo").parse(words)
    run = begin("dpo", script_args, training_args, model_args, recipe)
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    collator = DPOCollator(processor, training_args.max_length, training_args.pad_to_multiple_of)
    splits = load_splits(
        script_args, mixture, training_args, "preference", dataset_num_proc=training_args.dataset_num_proc
    )
    train_rows, eval_rows = (
        None if rows is None else drop_overlong(rows, collator, training_args.overlong) for rows in splits
    )
    training_args.remove_unused_columns = False  # the collator names rows in its errors
    set_seed(training_args.seed)  # TRL seeds only after it has drawn the weights of a fresh adapter
    model, peft_config = load_policy_start(model_args)
    trainer = LlavaDPOTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    return run.train(trainer, model_args.model_name_or_path)


if __name__ == "__main__":
    run_as_program(main)
