"""Configs keep TRL's defaults, refuse what cannot work with images, and name the fields to change."""

import dataclasses
from typing import Any

import pytest
from trl import ModelConfig, RewardConfig, SFTConfig

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.reward import LlavaRewardConfig
from trl_llava.configs.sft import LlavaSFTConfig
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments

TRL_1_12 = {
    "learning_rate": 3e-06,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "world_size": None,
    "num_total_batches": None,
    "micro_batch_size": None,
    "local_batch_size": None,
    "batch_size": None,
    "local_mini_batch_size": None,
    "mini_batch_size": None,
    "push_to_hub": False,
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
}
"""The fields that TRL 1.12's PPOConfig adds to TrainingArguments or changes there, with their defaults."""


def make(kind: type, **fields: Any) -> Any:
    if kind in (LlavaScriptArguments, LlavaModelConfig):
        return kind(**fields)
    return kind(output_dir="unused", bf16=False, use_cpu=True, report_to="none", **fields)


def defaults(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("ours", "trls", "changed"),
    [
        (LlavaSFTConfig, SFTConfig, {"assistant_only_loss"}),
        (LlavaRewardConfig, RewardConfig, set()),
        (LlavaModelConfig, ModelConfig, set()),
    ],
)
def test_trls_fields_keep_their_defaults(ours: type, trls: type, changed: set[str]) -> None:
    mine, theirs = defaults(ours), defaults(trls)
    assert {name for name in theirs if mine[name] != theirs[name]} == changed


def test_ppo_has_the_fields_and_defaults_of_trl_1_12() -> None:
    mine = defaults(LlavaPPOConfig)
    changed = {name for name in TRL_1_12 if mine[name] != TRL_1_12[name]}
    assert changed == {"sft_model_path", "reward_model_path"}  # ours load nothing by default


def test_those_are_trls_where_it_still_has_them() -> None:
    ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL has no PPO since 1.13: `make test-oldest` runs this")
    theirs = defaults(ppo.PPOConfig)
    assert {name: theirs[name] for name in ppo.PPOConfig.__annotations__} == TRL_1_12


def test_our_ppo_fields_are_neutral() -> None:
    config = make(LlavaPPOConfig)
    off = ("correctness_coef", "length_coef", "normalize_scores", "reward_funcs", "reward_weights")
    assert [getattr(config, name) for name in off] == [None] * 5
    assert (config.clamp_kl, config.reward_scale, config.reward_bias) == (False, 1.0, 0.0)
    assert make(LlavaRewardConfig).reward_centering == "trl"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LlavaScriptArguments, {"dataset_streaming": True}, "`dataset_streaming` must stay False"),
        (LlavaScriptArguments, {"ignore_bias_buffers": True}, "`ignore_bias_buffers` must stay False"),
        (LlavaSFTConfig, {"packing": True}, "`packing` must stay False .found True.: .* never cut or joined"),
        (LlavaSFTConfig, {"eval_packing": True}, "`eval_packing` must stay None"),
        (LlavaSFTConfig, {"padding_free": True}, "`padding_free` must stay False"),
        (LlavaSFTConfig, {"truncation_mode": "keep_end"}, "`truncation_mode` .* see `overlong`"),
        (LlavaSFTConfig, {"dataset_text_field": "body"}, "`dataset_text_field` must stay 'text'"),
        (LlavaSFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "`dataset_kwargs` must stay None"),
        (LlavaSFTConfig, {"pad_token": "x"}, "`pad_token` .* belongs to the processor"),
        (LlavaSFTConfig, {"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` must stay"),
        (LlavaSFTConfig, {"max_length": 0}, "`max_length` must be above 0, found 0"),
        (LlavaSFTConfig, {"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be above 0, found 0"),
        (LlavaModelConfig, {"lora_r": 0}, "`lora_r` must be above 0, found 0"),
        (LlavaRewardConfig, {"pad_token": "x"}, "`pad_token` .* belongs to the processor"),
        (
            LlavaRewardConfig,
            {"reward_centering": "none", "center_rewards_coefficient": 0.1},
            "`center_rewards_coefficient=0.1` contradicts reward_centering",
        ),
        (LlavaPPOConfig, {"batch_size": 8}, "`batch_size` must stay None .* the trainer computes it"),
        (LlavaPPOConfig, {"eval_strategy": "steps"}, "`eval_strategy` .* no evaluation loss"),
        (LlavaPPOConfig, {"temperature": 0.0}, "`temperature` must be above 0"),
        (LlavaPPOConfig, {"missing_eos_penalty": -8.0, "stop_token": "eos"}, "`missing_eos_penalty` must be above 0"),
        (LlavaPPOConfig, {"missing_eos_penalty": 8.0}, "needs a stop token.*`stop_token: eos`"),
        (LlavaPPOConfig, {"stop_token": "eos", "stop_token_id": 2}, "`stop_token` and `stop_token_id` exclude"),
        (
            LlavaPPOConfig,
            {"num_mini_batches": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            r"`num_mini_batches` \(3\) must divide `per_device_train_batch_size` \(4\) \* "
            r"`gradient_accumulation_steps` \(2\) = 8 .* change one of the three",
        ),
        (
            LlavaPPOConfig,
            {"whiten_rewards": True, "num_mini_batches": 2, "per_device_train_batch_size": 8},
            r"`whiten_rewards` needs at least 8 .* leaves 4",
        ),
    ],
)
def test_refused_with_the_reason(kind: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **fields)


@pytest.mark.parametrize(
    ("assistant_only", "completion_only", "labels_on"),
    [
        (True, None, "answers"),
        (True, False, "answers"),
        (True, True, "completion"),
        (False, None, "completion"),
        (False, True, "completion"),
        (False, False, "all"),
    ],
)
def test_labels_on(assistant_only: bool, completion_only: bool | None, labels_on: str) -> None:
    config = make(LlavaSFTConfig, assistant_only_loss=assistant_only, completion_only_loss=completion_only)
    assert config.labels_on == labels_on


def test_num_mini_batches_that_divides_is_fine() -> None:
    config = make(LlavaPPOConfig, num_mini_batches=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert config.num_mini_batches == 4
