"""Stage 2: a reward model that reads prompt, image, completion and the captions of the image.

In:  a base model (or stage 1's adapter on it), and rows with `prompt`, `chosen`, `rejected`, `images` and `captions`.
Out: `output_dir` with adapter and head (or model), processor, factual_reward.json (the judging prompt, without which
     no score is right), trainer state, recipe.yaml, versions.json and a model card; stage 3 takes it as it is.

    accelerate launch -m trl_llava.train_reward --config recipes/llava-1.5-7b-hf/reward.yaml [--field value ...]
"""

from collections.abc import Sequence

from trl_llava.models.adapters import lora_config
from trl_llava.models.starts import load_recipe_processor, load_score_model
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.run.console import run_as_program
from trl_llava.stage_run import begin, explains


@explains("reward")
def main(args: Sequence[str] | None = None) -> LlavaRewardTrainer:
    """Runs the stage and returns its trainer; `args` is the command line without the program's name."""
    run = begin("reward", args)
    training_args, model_args = run.training_args, run.model_args
    base, adapter = model_args.model_name_or_path, model_args.adapter_name_or_path
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    training_args.chat_template_path = None  # the processor has it now; TRL would set it after the rows are checked
    train_rows, eval_rows = run.load_rows("preference", require_captions=training_args.with_captions)
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
        judging_prompt=training_args.make_judging_prompt(),
        peft_config=None if adapter else lora_config(model_args, model, task="SEQ_CLS"),
    )
    return run.train(trainer, base)


if __name__ == "__main__":
    run_as_program(main)
