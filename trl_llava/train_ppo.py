"""Stage 3: PPO with the factual reward; policy, value model and reward model all see the image.

In:  stage 1's adapter (or a full model), stage 2's reward model or reward functions of your own, and rows with
     `prompt` and `images`, where there are any with `captions`, `answer_type` and `length_multiplier`.
Out: `output_dir` with the policy's adapter (or model), value_model/, processor, trainer state, recipe.yaml,
     versions.json, a model card and completions/ (sample completions with their rewards).

    accelerate launch -m trl_llava.train_ppo --config recipes/llava-1.5-7b-hf/ppo.yaml [--field value ...]
"""

from collections.abc import Sequence

import torch
from accelerate import PartialState

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapter_role import cast_adapters
from trl_llava.models.loaded_models import describe_models
from trl_llava.ppo.roles import Policy, Value, load_policy_roles, load_value_model
from trl_llava.ppo_trainer import LlavaPPOTrainer
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.functions import RewardFunction
from trl_llava.rewards.reward_loading import check_rewards, load_rewards
from trl_llava.rewards.reward_settings import shows_captions
from trl_llava.run.console import run_as_program
from trl_llava.stage_run import begin, explains


@explains("ppo")
def main(args: Sequence[str] | None = None) -> LlavaPPOTrainer:
    """Runs the stage and returns its trainer; `args` is the command line without the program's name."""
    run = begin("ppo", args)
    training_args, model_args = run.training_args, run.model_args
    reads_captions = shows_captions(training_args.reward_model_path, training_args.reward_model_revision)
    train_rows, eval_rows = run.load_rows("prompt", require_captions=bool(reads_captions))
    policy, value, rewards = load_all(training_args, model_args)
    trainer = LlavaPPOTrainer(
        args=training_args,
        processing_class=policy.processor,
        model=policy.model,
        ref_model=policy.reference,
        reward_funcs=rewards,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        value_model=value.model,
        value_processing_class=value.processor,
    )
    return run.train(trainer, policy.base)


def load_all(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> tuple[Policy, Value, list[RewardFunction]]:
    """Loads policy with reference, value model and rewards, and prints what they take in memory."""
    check_rewards(args)
    policy = load_policy_roles(args, model_args)
    value = load_value_model(args, model_args, policy)
    rewards = load_rewards(args, model_args, [*policy.shared, *value.shared])
    models = {"policy": policy.model, "reference": policy.reference or policy.model, "value": value.model}
    if rewards and isinstance(rewards[0], FactualReward):
        models["reward"] = rewards[0].model
    if args.adapter_dtype is not None:
        for model in models.values():
            cast_adapters(model, getattr(torch, args.adapter_dtype))
    PartialState().print(describe_models(models))
    return policy, value, rewards


if __name__ == "__main__":
    run_as_program(main)
