"""The rewards that a recipe names: the factual reward, and functions of the user's own."""

import importlib
from collections.abc import Sequence
from typing import Any

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import RecipeError
from trl_llava.hub.lookup import check_there
from trl_llava.models.sharded_weights import loaded_whole
from trl_llava.models.shared_base import SharedBase
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.functions import RewardFunction


def check_rewards(args: LlavaPPOConfig) -> None:
    """Refuse a recipe without any reward, before a model is loaded."""
    if not any((args.reward_model_path, args.reward_funcs)) and args.correctness_coef is args.length_coef is None:
        raise RecipeError(
            "nothing to learn from: set `reward_model_path`, `reward_funcs`, `correctness_coef` or `length_coef`."
        )


def load_rewards(
    args: LlavaPPOConfig, model_args: LlavaModelConfig, shared: Sequence[SharedBase] = ()
) -> list[RewardFunction]:
    """The rewards of a PPO run, the reward model first; it may use the base of one of the `shared` models."""
    return load_reward_functions(
        args.reward_model_path,
        args.reward_model_revision,
        args.reward_funcs,
        model_args,
        shared=shared,
        batch_size=args.local_rollout_forward_batch_size,
        max_tokens=args.max_tokens_per_micro_batch,
        share_prefix=args.share_prefix,
    )


def load_reward_functions(
    reward_model: str | None,
    revision: str | None,
    functions: list[str] | None,
    model_args: LlavaModelConfig,
    *,
    shared: Sequence[SharedBase] = (),
    **settings: Any,
) -> list[RewardFunction]:
    """The factual reward, if one is named, on this process's device, and the recipe's own functions behind it.

    Args:
        reward_model: `FactualReward` checkpoint.
        revision: Branch, tag or commit of it.
        functions: Paths "package.module:function".
        model_args: dtype, quantisation and attention of the reward model.
        shared: Loaded models, one of whose bases the reward model may use.
        **settings: `batch_size`, `max_tokens` and `share_prefix` of the factual reward.

    Returns:
        Reward functions.
    """
    rewards: list[RewardFunction] = []
    if reward_model is not None:
        check_there("reward_model_path", reward_model, revision)
        # Each process scores its own completions, in as many passes as that needs: no weights that all fetch together.
        bases = () if is_deepspeed_zero3_enabled() else shared
        with loaded_whole():
            rewards.append(
                FactualReward.from_pretrained(
                    reward_model, revision=revision, model_args=model_args, shared=bases, **settings
                )
            )
    return rewards + [find_function(path) for path in functions or []]


def find_function(path: str) -> RewardFunction:
    """Import a reward function by its path "package.module:function"."""
    module_name, _, name = path.partition(":")
    if not name:
        raise RecipeError(f"`reward_funcs`: {path!r} must be 'package.module:function'.")
    try:
        function: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(f"`reward_funcs`: cannot import {module_name!r} of {path!r}: {error}.") from error
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise RecipeError(f"`reward_funcs`: module {module_name!r} has no function {name!r}.")
    return function
