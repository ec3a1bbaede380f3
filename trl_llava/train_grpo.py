"""Instead of stage 3: TRL's GRPO with the factual reward, which sees the image and reads its captions.

In:  a base model with or without stage 1's adapter, stage 2's reward model or reward functions of your own, and the
     rows of PPO (`prompt` and `images`, where there are any with `captions` and `answer_type`).
Out: `output_dir` with the adapter (or model), processor, trainer state, recipe.yaml, versions.json and a model card.

    accelerate launch -m trl_llava.train_grpo --config recipes/llava-1.5-7b-hf/grpo.yaml [--field value ...]
"""

from collections.abc import Sequence

from trl import GRPOTrainer

from trl_llava.online_rl import run_online
from trl_llava.run.console import run_as_program
from trl_llava.stage_run import explains


@explains("grpo")
def main(args: Sequence[str] | None = None) -> GRPOTrainer:
    """Runs the stage and returns its trainer; `args` is the command line without the program's name."""
    return run_online("grpo", GRPOTrainer, args)


if __name__ == "__main__":
    run_as_program(main)
