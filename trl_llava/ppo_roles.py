"""Who takes part in a PPO run: policy, reference, value model and rewards, as the recipe names them."""

import importlib
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from trl_llava.adapters import freeze_as_asked, load_adapter, lora_config
from trl_llava.configs import LlavaModelConfig
from trl_llava.configs_ppo import LlavaPPOConfig
from trl_llava.factual_reward import FactualReward
from trl_llava.hub import check_there
from trl_llava.models import check_same_tokenizer, load_policy, load_processor
from trl_llava.recipe_values import RecipeError
from trl_llava.reward_settings import find_file
from trl_llava.score_start import (
    adapter_base,
    agreed_base,
    load_score_model,
    revision_of_base,
    with_base,
    zero_head,
)
from trl_llava.scoring import RewardFunction


class Policy(NamedTuple):
    """The policy and what it is compared with.

    Attributes:
        model: The policy; with an adapter, the frozen copy "reference" of it is there too.
        reference: A model of its own, or None if the policy's base and adapters serve as one.
        peft_config: A fresh adapter that the trainer shall put on the policy, or None.
        processor: Its processor.
        base: Hub ID or folder of the base model.
        start: Hub ID or folder of the weights it starts from, with their revision.
    """

    model: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None
    peft_config: LoraConfig | None
    processor: ProcessorMixin
    base: str
    start: tuple[str, str | None]


def load_policy_roles(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> Policy:
    """Loads policy and reference; with an adapter, names both in `args`.

    Args:
        args: `sft_model_path`; `model_adapter_name` and `ref_adapter_name`, no choice of a recipe, are set if it
            is an adapter.
        model_args: The base model, dtype, quantisation, a fresh adapter's shape.

    Returns:
        The policy.

    Raises:
        RecipeError: If no model is named, adapter and recipe name different bases, or the recipe names a reference.
        OSError: If there is no such model.
        ValueError: If the adapter does not fit the base, or a part shall be trained that it does not hold.
    """
    if args.ref_adapter_name is not None:
        raise RecipeError(
            f"`ref_adapter_name` must stay null (found {args.ref_adapter_name!r}): the reference is what the policy "
            "starts from, `sft_model_path` or the base model. For another one use LlavaPPOTrainer itself."
        )
    start, revision = _policy_start(args, model_args)
    check_there("sft_model_path" if args.sft_model_path else "model_name_or_path", start, revision)
    trained_on = adapter_base(start, revision)
    if trained_on is None:
        return _full_policy(args, model_args, start, revision)
    base = agreed_base(model_args.model_name_or_path, start, trained_on)
    base_revision = revision_of_base(base, start, revision, model_args)
    model = load_policy(with_base(model_args, base, base_revision))
    model = load_adapter(model, start, adapter_name="default", is_trainable=True, revision=revision)
    load_adapter(model, start, adapter_name="reference", is_trainable=False, revision=revision)
    freeze_as_asked(model, start, model_args)
    args.model_adapter_name, args.ref_adapter_name = "default", "reference"
    processor = _processor(start, args, model_args, revision, base)
    return Policy(model, None, None, processor, base, (start, revision))


def load_policy_processor(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> ProcessorMixin:
    """Loads the policy's processor as `load_policy_roles` does, without the policy.

    Args:
        args: `sft_model_path`, and `chat_template_path`.
        model_args: The base model.

    Returns:
        The processor.

    Raises:
        RecipeError: If no model is named, or adapter and recipe name different bases.
        OSError: If there is no such model.
    """
    start, revision = _policy_start(args, model_args)
    trained_on = adapter_base(start, revision)
    base = start if trained_on is None else agreed_base(model_args.model_name_or_path, start, trained_on)
    return _processor(start, args, model_args, revision, base)


def load_value_model(
    args: LlavaPPOConfig, model_args: LlavaModelConfig, policy: Policy
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin | None]:
    """Loads the value model, with its head at zero.

    Args:
        args: `value_model_path`, else `value_init` says where the backbone comes from.
        model_args: dtype, quantisation, what is frozen.
        policy: The policy, whose tokens the value model reads.

    Returns:
        The model, and its processor if that differs from the policy's.

    Raises:
        RecipeError: If `value_init` is "reward" and there is no reward model.
        ValueError: If the value model reads the policy's token IDs as other tokens.
    """
    name, revision, field = args.value_model_path, args.value_model_revision, "value_model_path"
    if name is None and args.value_init == "policy":
        (name, revision), field = policy.start, "policy"
    elif name is None:
        name, revision, field = args.reward_model_path, args.reward_model_revision, "reward_model_path"
    if name is None:
        raise RecipeError(
            "`value_init: reward` needs `reward_model_path`: set it, or `value_init: policy`, or `value_model_path`."
        )
    check_there(field, name, revision)
    given = model_args.model_name_or_path if field == "policy" else None
    model = load_score_model(name, model_args, base=given, revision=revision, seed=args.seed)
    zero_head(model)
    base = policy.base if field == "policy" else (adapter_base(name, revision) or name)
    processor = policy.processor if field == "policy" else _processor(name, args, model_args, revision, base)
    check_same_tokenizer(policy.processor, processor, f"value model ({field})")
    same = processor.chat_template == policy.processor.chat_template
    same = same and processor.to_dict() == policy.processor.to_dict()  # image processor, patches, image tokens, ...
    return model, None if same else processor


def load_rewards(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> list[RewardFunction]:
    """Loads the rewards of a PPO run.

    Args:
        args: `reward_model_path` and `reward_funcs`.
        model_args: dtype, quantisation and attention of the reward model.

    Returns:
        Reward functions, the reward model first.

    Raises:
        RecipeError: If there is none, or a function cannot be found.
        ValueError: If the checkpoint has no judging prompt or no head.
    """
    rewards = load_reward_functions(
        args.reward_model_path,
        args.reward_model_revision,
        args.reward_funcs,
        model_args,
        batch_size=args.local_rollout_forward_batch_size,
        device=PartialState().device,
    )
    if not rewards and args.correctness_coef is None and args.length_coef is None:
        raise RecipeError(
            "nothing to learn from: set `reward_model_path`, `reward_funcs`, `correctness_coef` or `length_coef`."
        )
    return rewards


def load_reward_functions(
    reward_model: str | None,
    revision: str | None,
    functions: list[str] | None,
    model_args: LlavaModelConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> list[RewardFunction]:
    """Loads the factual reward, if one is named, and the recipe's own functions.

    Args:
        reward_model: FactualReward checkpoint.
        revision: Branch, tag or commit of it.
        functions: Paths "package.module:function".
        model_args: dtype, quantisation and attention of the reward model.
        batch_size: How many answers are scored in one pass.
        device: Where the reward model goes.

    Returns:
        Reward functions, the reward model first.

    Raises:
        RecipeError: If a function cannot be found.
        ValueError: If the checkpoint has no judging prompt or no head.
    """
    rewards: list[RewardFunction] = []
    if reward_model is not None:
        check_there("reward_model_path", reward_model, revision)
        rewards.append(
            FactualReward.from_pretrained(
                reward_model, revision=revision, model_args=model_args, batch_size=batch_size, device=device
            )
        )
    return rewards + [find_function(path) for path in functions or []]


def find_function(path: str) -> RewardFunction:
    """Imports a reward function.

    Args:
        path: "package.module:function".

    Returns:
        The function.

    Raises:
        RecipeError: If there is no such module or function.
    """
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


def _policy_start(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> tuple[str, str | None]:
    """What the policy starts from, with its revision."""
    if model_args.adapter_name_or_path:
        raise RecipeError("`adapter_name_or_path`: in PPO, name stage 1's adapter as `sft_model_path`.")
    if args.sft_model_path is not None:
        return args.sft_model_path, args.sft_model_revision
    if model_args.model_name_or_path is None:
        raise RecipeError("set `sft_model_path` (stage 1's adapter or model), or `model_name_or_path`.")
    return model_args.model_name_or_path, model_args.model_revision


def _full_policy(args: LlavaPPOConfig, model_args: LlavaModelConfig, start: str, revision: str | None) -> Policy:
    """A policy whose start is a whole model: trained with a fresh adapter, or as a whole against a second copy."""
    model = load_policy(with_base(model_args, start, revision))
    processor = _processor(start, args, model_args, revision)
    peft_config = lora_config(model_args, model, task="CAUSAL_LM")
    reference = None
    if peft_config is None:
        reference = load_policy(with_base(model_args, start, revision)).requires_grad_(False).eval()
    return Policy(model, reference, peft_config, processor, start, (start, revision))


def _processor(
    name: str, args: LlavaPPOConfig, model_args: LlavaModelConfig, revision: str | None, base: str | None = None
) -> ProcessorMixin:
    """The processor saved with a stage's result, else its base's."""
    fields = {getattr(args, field): field for field in ("sft_model_path", "value_model_path", "reward_model_path")}
    if base is not None and not find_file(name, "tokenizer_config.json", revision):  # an adapter saved on its own
        name, revision = base, revision_of_base(base, name, revision, model_args)
    return load_processor(
        name,
        revision=revision,
        trust_remote_code=model_args.trust_remote_code,
        pad_to_square=model_args.pad_to_square,
        chat_template_path=args.chat_template_path,
        field=fields.get(name, "model_name_or_path"),
    )
