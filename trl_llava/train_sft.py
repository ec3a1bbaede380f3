"""Stage 1: LoRA (or full) fine-tuning on conversations about images; the policy that PPO starts from.

In:  a base model by Hub ID or folder, and rows with `images` and `prompt` + `completion` (or LLaVA JSON).
Out: `output_dir` with the adapter (or model), processor, trainer state, recipe.yaml, versions.json and a model card.

    accelerate launch -m trl_llava.train_sft --config recipes/llava-1.5-7b-hf/sft.yaml [--field value ...]
"""

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig

from trl_llava.configs.recipe import RecipeParser
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments, LlavaSFTConfig
from trl_llava.data.splits import load_splits
from trl_llava.models.policy_start import load_policy_start, load_recipe_processor
from trl_llava.run.console import run_as_program
from trl_llava.sft_trainer import LlavaSFTTrainer
from trl_llava.stage_run import begin


def make_parser(prog: str | None = None) -> RecipeParser:
    """The parser of this stage's recipes.

    Args:
        prog: Name of the command in `--help`.

    Returns:
        The parser.
    """
    return RecipeParser((LlavaScriptArguments, LlavaSFTConfig, LlavaModelConfig, DatasetMixtureConfig), prog=prog)


def main(args: Sequence[str] | None = None) -> LlavaSFTTrainer:
    """Runs the stage.

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
    script_args, training_args, model_args, mixture, recipe = make_parser("train_sft").parse(words)
    run = begin("sft", script_args, training_args, model_args, recipe)
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    training_args.chat_template_path = None  # the processor has it now; TRL would set it after the rows are checked
    train_rows, eval_rows = load_splits(
        script_args, mixture, training_args, "sft", dataset_num_proc=training_args.dataset_num_proc
    )
    model, peft_config = load_policy_start(model_args)
    trainer = LlavaSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    return run.train(trainer, model_args.model_name_or_path)


if __name__ == "__main__":
    run_as_program(main)
