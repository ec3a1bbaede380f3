"""Instead of stages 2 and 3: TRL's DPO on the rows that the reward model is trained on, captions unused.

In:  a base model with or without stage 1's adapter, and rows with `prompt`, `chosen`, `rejected` and `images`.
Out: `output_dir` with the adapter (or model), processor, trainer state, recipe.yaml, versions.json and a model card.

    accelerate launch -m trl_llava.train_dpo --config recipes/llava-1.5-7b-hf/dpo.yaml [--field value ...]
"""

from collections.abc import Sequence

from transformers import set_seed
from trl import DPOTrainer

from trl_llava.data.lengths import drop_overlong
from trl_llava.data.preference_collators import DPOCollator
from trl_llava.models.longest_row import positions_of
from trl_llava.models.starts import load_policy_start, load_recipe_processor
from trl_llava.publish.trainer import PushesSafely
from trl_llava.run.console import run_as_program
from trl_llava.run.safe_checkpoints import SafeCheckpoints
from trl_llava.stage_run import begin, explains


class LlavaDPOTrainer(SafeCheckpoints, PushesSafely, DPOTrainer):
    """TRL's `DPOTrainer` with checkpoints that survive a kill, and that a run goes on from."""

    stage = "dpo"


@explains("dpo")
def main(args: Sequence[str] | None = None) -> DPOTrainer:
    """Runs the stage and returns its trainer; `args` is the command line without the program's name."""
    run = begin("dpo", args)
    training_args, model_args = run.training_args, run.model_args
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    collator = DPOCollator(processor, training_args.max_length, training_args.pad_to_multiple_of)
    positions = positions_of(model_args.model_name_or_path, revision=model_args.model_revision)
    train_rows, eval_rows = (
        None if rows is None else drop_overlong(rows, collator, training_args.overlong, positions=positions)
        for rows in run.load_rows("preference")
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
