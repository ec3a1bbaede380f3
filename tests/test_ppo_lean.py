"""What a PPO step does not spend: graphs of passes that nothing is learned from, and memory of the phase before."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainers import favour_the_stop_token, make_adapter, ppo_trainer
from transformers import AutoProcessor

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.sequence_classification import LlavaForSequenceClassification
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.train_ppo import load_all


@pytest.fixture(scope="module")
def adapter_dir(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("recompute", [True, None])
def test_passes_of_the_rollout_keep_no_graph_and_hand_on_ordinary_tensors(
    tiny_llava_dir, adapter_dir, tmp_path, recompute
):
    settings = {"num_generations_per_prompt": 2, "recompute_logprobs": recompute}
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **settings)
    modes = []
    model = trainer.accelerator.unwrap_model(trainer.model)
    for role in (model.policy, model.value_model):
        decoder = role.get_base_model().model.language_model
        decoder.register_forward_hook(
            lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        )
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    # Policy, where its log-probabilities are not those of the draw, reference and value; generation came before.
    assert modes.count((False, True)) == (3 if recompute else 2) and modes[-2:] == [(False, True)] * 2
    features = rollout.inputs.image_kwargs()["mm_encoder_outputs"]["image"].pooler_output
    for tensor in (rollout.logprobs, rollout.ref_logprobs, rollout.values, *features):
        assert not tensor.is_inference() and not tensor.requires_grad
    trainer.score(rollout, 1)
    trainer.compute_advantages(rollout, 1)
    trainer.update(rollout, 1)


def test_a_step_keeps_nothing_of_the_one_before(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, total_episodes=12)
    ask, update = trainer.rollout, trainer.update
    kept: list[weakref.ref] = []

    def rollout(batch: dict[str, Any], step: int) -> Any:
        assert [reference() for reference in kept] == [None] * len(kept), f"still there at step {step}"
        pixels = batch["pixel_values"]
        made = ask(batch, step)
        kept.extend(map(weakref.ref, (made, made.responses)))
        trainer.pixels = weakref.ref(pixels)
        return made

    def without_pixels(made: Any, step: int) -> dict[str, float]:
        assert trainer.pixels() is None  # features have taken their place
        return update(made, step)

    trainer.rollout, trainer.update = rollout, without_pixels
    trainer.train()
    assert len(kept) == 6  # of 3 steps: the rollout, and its responses; features stay within their own bound


@pytest.mark.parametrize("share_base", [True, False])
def test_the_attention_of_the_recipe_reaches_every_role(tiny_llava_dir, adapter_dir, tmp_path, share_base):
    torch.manual_seed(0)
    reward = LlavaForSequenceClassification.from_pretrained(tiny_llava_dir, num_labels=1)
    FactualReward(reward, AutoProcessor.from_pretrained(tiny_llava_dir), None).save_pretrained(tmp_path / "rm")
    args = LlavaPPOConfig(
        output_dir=str(tmp_path), sft_model_path=str(adapter_dir), reward_model_path=str(tmp_path / "rm"),
        value_init="policy", share_base=share_base, report_to=[], bf16=False,
    )  # fmt: skip
    policy, value, rewards = load_all(args, LlavaModelConfig(attn_implementation="eager"))
    for model in (policy.model, value.model, rewards[0].model):
        assert model.config.get_text_config()._attn_implementation == "eager"
        assert model.config.vision_config._attn_implementation == "eager"


@pytest.fixture
def no_dynamo_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' `TrainingArguments` writes `torch_compile` into the environment."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")


def test_accelerates_dynamo_is_refused(tiny_llava_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"does not run with accelerate's `dynamo_backend`.*`torch_compile: true`"):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)


@pytest.mark.slow  # dynamo takes half a minute to trace
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_numbers(
    tiny_llava_dir, adapter_dir, tmp_path, no_dynamo_left_behind, checkpointing
):
    logs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, gradient_checkpointing=checkpointing, **changes)
        favour_the_stop_token(trainer.policy_model)
        layers = trainer.policy_model.get_base_model().model.language_model.layers
        parts = [part for layer in layers for part in (layer.children() if checkpointing else [layer])]
        assert all((part._compiled_call_impl is not None) == bool(changes) for part in parts)
        trainer.train()
        logs.append(trainer.state.log_history)
    for expected, actual in zip(*logs, strict=True):
        for name in expected:
            if not name.startswith(("time/", "tokens_per_second", "eps")):
                assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
