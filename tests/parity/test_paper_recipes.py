"""The recipes of the paper's models hold what its published scripts amount to; docs/deviations.md has the rest."""

from pathlib import Path
from typing import Any

import golden_data
import pytest

from trl_llava.configs.recipe import make_parser

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = golden_data.read("6_effective_args.json")
GPUS = 8
PATCHES = {"7b-v1.5-224": 256, "13b-v1.5-336": 576}
SAME_NAME = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "seed")


def effective(script: str) -> dict[str, Any]:
    """Every argument of a script after parsing, whatever group it is in."""
    return {
        name: value
        for group in SCRIPTS[f"RLHF/scripts/{script}.sh"]["effective"].values()
        for name, value in group.items()
    }


def recipe(model: str, stage: str) -> tuple[Any, ...]:
    words = ["--config", str(RECIPES / f"llava-rlhf-{model}" / f"{stage}.yaml"), "--bf16", "false", "--use_cpu"]
    return make_parser(stage.split("_")[0]).parse(words)


def check_lora(model_args: Any, theirs: dict[str, Any]) -> None:
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        assert getattr(model_args, name) == theirs[name], name
    assert set(theirs["lora_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model_args.lora_target_modules is None  # the language model's linear layers, which are these
    assert model_args.freeze_projector is theirs["freeze_mm_mlp_adapter"]
    assert model_args.pad_to_square is (theirs["image_aspect_ratio"] == "pad")


@pytest.mark.parametrize("model", PATCHES)
def test_sft(model: str) -> None:
    theirs = effective(f"{model}/initialize_policy_model")
    _, ours, model_args, *_ = recipe(model, "sft")
    check_lora(model_args, theirs)
    for name in (*SAME_NAME, "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"):
        assert getattr(ours, name) == theirs[name], name
    assert ours.warmup_steps == theirs["warmup_ratio"]  # below 1 it is a share of the steps


def test_reward_model() -> None:
    theirs = effective("13b-v1.5-336/train_reward_model")
    _, ours, model_args, mixture, *_ = recipe("13b-v1.5-336", "reward")
    check_lora(model_args, theirs)
    same = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "eval_steps",
        "save_steps",
    )
    for name in (*SAME_NAME, *same, "save_total_limit"):
        assert getattr(ours, name) == theirs[name], name
    assert ours.warmup_steps == theirs["warmup_ratio"]
    assert mixture.test_split_size == theirs["eval_size"]
    assert ours.max_length == theirs["model_max_length"] + PATCHES["13b-v1.5-336"] - 1  # an image is one token there
    assert (ours.reward_centering, ours.with_captions) == ("paper", True)


@pytest.mark.parametrize("model", PATCHES)
def test_ppo(model: str) -> None:
    theirs = effective(f"{model}/train_rl_model")
    _, ours, model_args, *_ = recipe(model, "ppo")
    same = ("warmup_steps", "save_steps", "logging_steps", "vf_coef", "cliprange", "cliprange_value", "gamma", "lam")
    for name in (*SAME_NAME, *same, "whiten_rewards", "temperature", "kl_coef", "reward_bias"):
        assert getattr(ours, name) == theirs[name], name
    other_name = {
        "num_train_epochs": "total_epochs",
        "num_ppo_epochs": "noptepochs",
        "per_device_train_batch_size": "step_per_device_batch_size",
        "response_length": "response_len",
        "kl_estimator": "kl_approximator",
        "length_coef": "length_bonus_score",
        "correctness_coef": "correct_bonus_score",
    }
    for name, original in other_name.items():
        assert getattr(ours, name) == theirs[original], name
    assert -ours.missing_eos_penalty == theirs["penalty_reward_value"] and theirs["relative_stop_token_penalty"]
    rollouts = GPUS * ours.per_device_train_batch_size * ours.gradient_accumulation_steps
    assert rollouts == theirs["rollout_batch_size"]
    assert rollouts // ours.num_mini_batches == theirs["step_batch_size"]
    assert ours.max_prompt_length == theirs["query_len"] + PATCHES[model] - 1
    assert (ours.value_init == "reward") is theirs["init_value_with_reward"]
    assert model_args.freeze_projector is theirs["freeze_mm_mlp_adapter"]
    # What the original does whatever its scripts say.
    assert (ours.clamp_kl, ours.reward_scale, ours.whiten_variance) == (True, 10.0, "population")
    assert (ours.yes_no, ours.stop_token, ours.missing_eos_replaces) == ("no_only", "eos", False)
