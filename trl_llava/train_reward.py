"""Stage 2: a reward model that reads image, question, answer and the captions of the image.

In:  a base model (or stage 1's adapter on it), and rows with `prompt`, `chosen`, `rejected`, `images` and `captions`.
Out: `output_dir` with adapter and head (or model), processor, factual_reward.json (the judging prompt, without which
     no score is right), trainer state, recipe.yaml, versions.json and a model card; stage 3 takes it as it is.

    accelerate launch -m trl_llava.train_reward --config recipes/llava-1.5-7b-hf/reward.yaml [--field value ...]
"""

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig

from trl_llava.configs.recipe import RecipeParser
from trl_llava.configs.stages import LlavaModelConfig, LlavaRewardConfig, LlavaScriptArguments
from trl_llava.data.splits import load_splits
from trl_llava.errors import RecipeError
from trl_llava.models.adapters import lora_config
from trl_llava.models.policy_start import load_recipe_processor
from trl_llava.models.score_start import load_score_model
from trl_llava.prompts import JudgingPrompt
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.run.console import run_as_program
from trl_llava.stage_run import begin


def make_parser(prog: str | None = None) -> RecipeParser:
    """The parser of this stage's recipes.

    Args:
        prog: Name of the command in `--help`.

    Returns:
        The parser.
    """
    return RecipeParser((LlavaScriptArguments, LlavaRewardConfig, LlavaModelConfig, DatasetMixtureConfig), prog=prog)


def make_judging_prompt(args: LlavaRewardConfig) -> JudgingPrompt:
    """The judging prompt of a recipe; what it leaves out is the paper's.

    Args:
        args: `judging_prompt` (texts), `with_captions` and `caption_seed`.

    Returns:
        The prompt.

    Raises:
        RecipeError: If a text is unknown, missing its mark, or not a text.
    """
    texts = args.judging_prompt or {}
    if not isinstance(texts, dict):
        raise RecipeError(f"`judging_prompt` must be a mapping of texts, found {texts!r}.")
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise RecipeError(
            f"`judging_prompt`: `{wrong[0]}` is {texts[wrong[0]]!r}, expected a text. Captions are switched "
            "by `with_captions` and shuffled by `caption_seed`."
        )
    try:
        return JudgingPrompt.from_dict({**texts, "with_captions": args.with_captions, "seed": args.caption_seed})
    except ValueError as error:
        raise RecipeError(f"`judging_prompt`: {error}") from error


def main(args: Sequence[str] | None = None) -> LlavaRewardTrainer:
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
    script_args, training_args, model_args, mixture, recipe = make_parser("train_reward").parse(words)
    judging_prompt = make_judging_prompt(training_args)
    run = begin("reward", script_args, training_args, model_args, recipe)
    base, adapter = model_args.model_name_or_path, model_args.adapter_name_or_path
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    training_args.chat_template_path = None  # the processor has it now; TRL would set it after the rows are checked
    train_rows, eval_rows = load_splits(
        script_args,
        mixture,
        training_args,
        "preference",
        require_captions=training_args.with_captions,
        dataset_num_proc=training_args.dataset_num_proc,
    )
    model = load_score_model(
        adapter or base,
        model_args,
        base=base,
        revision=model_args.adapter_revision if adapter else model_args.model_revision,
        seed=training_args.seed,
    )
    trainer = LlavaRewardTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        judging_prompt=judging_prompt,
        peft_config=None if adapter else lora_config(model_args, model, task="SEQ_CLS"),
    )
    return run.train(trainer, base)


if __name__ == "__main__":
    run_as_program(main)
