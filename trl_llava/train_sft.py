"""Stage 1: LoRA (or full) fine-tuning on conversations about images; the policy that PPO starts from.

In:  a base model by Hub ID or folder, and rows with `images` and `prompt` + `completion` (or LLaVA JSON).
Out: `output_dir` with the adapter (or model), processor, trainer state, recipe.yaml, versions.json and a model card.

    accelerate launch -m trl_llava.train_sft --config recipes/llava-1.5-7b-hf/sft.yaml [--field value ...]
"""

from collections.abc import Sequence

from trl_llava.models.starts import load_policy_start, load_recipe_processor
from trl_llava.run.console import run_as_program
from trl_llava.sft_trainer import LlavaSFTTrainer
from trl_llava.stage_run import begin, explains


@explains("sft")
def main(args: Sequence[str] | None = None) -> LlavaSFTTrainer:
    """Runs the stage and returns its trainer; `args` is the command line without the program's name."""
    run = begin("sft", args)
    training_args, model_args = run.training_args, run.model_args
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    training_args.chat_template_path = None  # the processor has it now; TRL would set it after the rows are checked
    train_rows, eval_rows = run.load_rows("sft")
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
