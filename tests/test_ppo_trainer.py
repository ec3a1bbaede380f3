"""PPO on a tiny LLaVA: what should move moves, what is frozen stays bit-identical, and bad runs stop."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from reference_passes import followed_by
from safetensors.torch import load_file
from tiny_trainers import favour_the_stop_token, make_adapter, make_policy, ppo_trainer, prompt_rows, weights
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.data.contract import RowError
from trl_llava.errors import ExplainedError, InputError
from trl_llava.health import UnhealthyRunError
from trl_llava.models.sequence_classification import LlavaForSequenceClassification
from trl_llava.ppo.passes import response_logprobs
from trl_llava.ppo.setup import prepare_roles, rounds_alike
from trl_llava.ppo_trainer import LlavaPPOTrainer


@pytest.fixture(scope="module")
def adapter_dir(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose B matrices are not zero, as after SFT."""
    return make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


def test_adapters_and_head_move_and_all_else_is_bit_identical(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    for name, value in before.items():
        adapter = ".default." in name
        assert torch.equal(after[name], value) != adapter, f"{name} {'did not move' if adapter else 'moved'}"
    moved = {name.split(".")[0] for name in before if ".default." in name}
    assert moved == {"policy", "value_model"}
    assert any("score" in name and ".default." in name for name in before)


def test_ids_that_no_token_has_are_never_drawn(tiny_llava_dir, adapter_dir, tmp_path):
    """The policy has 40 embeddings more than the tokenizer has tokens, and than the value model can read."""
    padded = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    padded.resize_token_embeddings(640)
    padded.save_pretrained(tmp_path / "padded")
    policy = make_policy(tmp_path / "padded", adapter_dir)
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path / "run", model=policy, response_length=20)
    trainer.train()
    assert {*range(600, 640)} < {*trainer.sampling.suppressed}


def test_what_a_step_logs(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(
        *(tiny_llava_dir, adapter_dir, tmp_path),
        correctness_coef=2.0,
        length_coef=-10.0,
        missing_eos_penalty=8.0,
        recompute_logprobs=True,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert len(steps) == 2
    first = steps[0]
    assert first["objective/kl"] == 0.0  # the same adapter, the same path, so not a bit of difference
    terms = [first[f"rewards/{name}/mean"] for name in ("even_tokens", "correctness", "length", "missing_eos")]
    assert first["objective/scores"] == pytest.approx(sum(terms), abs=1e-5)
    assert first["rewards/missing_eos/mean"] == pytest.approx(-8.0 * first["completions/clipped_ratio"])
    assert 1 <= first["completions/mean_length"] <= 8
    for name in ("time/generation", "time/forward", "time/score", "time/update", "tokens_per_second", "grad_norm"):
        assert first[name] > 0
    assert steps[1]["objective/kl"] != 0.0
    explained = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    shown = {re.sub("^rewards/[^/]+", "rewards/<name>", name) for name in first} - {"step", "epoch"}
    assert {name for name in shown if f"`{name}`" not in explained} == set()


def test_a_reference_that_is_not_the_start_stops_the_run(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, ref_adapter_name=None)  # the bare base
    with pytest.raises(UnhealthyRunError, match=r"objective/kl is .* expected 0"):
        trainer.train()
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, ref_adapter_name=None, check_first_step=False)
    trainer.train()


def test_a_policy_that_moved_between_rollout_and_update_stops_the_run(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)

    def nudge(**columns: Any) -> list[float]:
        for name, parameter in trainer.model.named_parameters():
            if name.startswith("policy") and "lora_B.default" in name:
                parameter.data.add_(0.05)
        return [0.0, 1.0, 2.0, 3.0]

    trainer.scorer.reward_funcs = [nudge]
    with pytest.raises(UnhealthyRunError, match="probability ratio is off"):
        trainer.train()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_and_names_function_and_row(
    tiny_llava_dir, adapter_dir, tmp_path, bad
):
    def broken(completion_ids: list, **columns: Any) -> list[float]:
        return [bad if i == 2 else 0.0 for i in range(len(completion_ids))]

    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=broken)
    before = weights(trainer)
    with pytest.raises(UnhealthyRunError, match=r"the reward of broken is not finite at step 1 \(rows \[2\]"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    tiny_llava_dir, adapter_dir, tmp_path
):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    poisoned = next(p for name, p in trainer.model.named_parameters() if "lora_B.default" in name)
    poisoned.register_hook(lambda gradient: gradient * math.nan)
    before = weights(trainer)
    with pytest.raises(UnhealthyRunError, match="the gradient norm is not finite at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def losses(trainer: LlavaPPOTrainer) -> list[tuple[float, ...]]:
    trainer.train()
    names = ("objective/kl", "objective/scores", "grad_norm", "completions/mean_length")
    return [tuple(e[name] for name in names) for e in trainer.state.log_history if "objective/kl" in e]


def test_accumulation_changes_nothing_though_responses_differ_in_length(tiny_llava_dir, adapter_dir, tmp_path):
    whole = ppo_trainer(
        tiny_llava_dir, adapter_dir, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    parts = ppo_trainer(
        tiny_llava_dir, adapter_dir, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    for trainer in (whole, parts):
        favour_the_stop_token(trainer.policy_model)
    first, second = losses(whole), losses(parts)
    assert len({length for *_, length in first}) > 1 and first[0][-1] < 8
    for expected, actual in zip(first, second, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=1e-5)


def test_the_result_does_not_depend_on_how_many_rows_run_at_once(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    for size in (1, 3):
        trainer.args.local_rollout_forward_batch_size = size
        model = trainer.accelerator.unwrap_model(trainer.model)
        with torch.no_grad():
            for row in range(0, 4, size):
                part = rollout.select(range(row, min(row + size, 4)))
                again, _ = response_logprobs(model.policy, part.inputs, part.responses, part.mask, trainer.sampling)
                torch.testing.assert_close(again, part.logprobs, rtol=1e-4, atol=1e-5)


def test_no_dropout_is_left_and_the_policys_config_is_as_it_was(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    policy = trainer.policy_model.get_base_model()
    attention = policy.model.vision_tower.encoder.layers[0].self_attn
    attention.dropout = policy.model.language_model.layers[0].self_attn.attention_dropout = 0.5
    policy.model.vision_tower.encoder.layers[0].mlp.extra = torch.nn.Dropout(0.5)
    prepare_roles(trainer.policy_model, trainer.value_model, None, trainer.args)
    rates = [getattr(m, name, 0) for m in policy.modules() for name in ("dropout", "attention_dropout", "p")]
    assert not any(rate for rate in rates if isinstance(rate, float))
    saved = LlavaConfig.from_pretrained(tiny_llava_dir).to_dict()
    assert policy.config.to_dict().get("use_cache") is saved.get("use_cache")


def test_ddp_looks_for_unused_parameters_only_where_a_tower_is_trained(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    assert trainer._build_accelerator_args()["kwargs_handlers"][0].find_unused_parameters is False
    # The tower's last layers stand behind the one whose features are selected, and get no gradient.
    trainer.policy_model.get_base_model().model.vision_tower.requires_grad_(True)
    assert trainer._build_accelerator_args()["kwargs_handlers"][0].find_unused_parameters is True


def test_a_mini_batch_is_one_optimizer_step(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, num_mini_batches=2, num_ppo_epochs=3)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == 2 * 3 * 2  # PPO steps * epochs * mini-batches


def test_the_first_step_of_a_warm_up_trains(tiny_llava_dir, adapter_dir, tmp_path):
    settings = {"total_episodes": 16, "warmup_steps": 2, "lr_scheduler_type": "linear", "save_strategy": "steps"}
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, save_steps=1, **settings)
    before = weights(trainer)
    trainer.train()
    rates = [0.01 / 3, 0.02 / 3, 0.01, 0.005]  # then 0; transformers' warm-up has 0, 0.005, 0.01, 0.005
    assert [row["lr"] for row in trainer.state.log_history] == pytest.approx(rates)
    first = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    name = next(name for name in first if name.endswith("lora_A.weight"))
    assert not torch.equal(first[name], before[f"policy.{name.removesuffix('.weight')}.default.weight"])
    resumed = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [row["lr"] for row in resumed.state.log_history] == pytest.approx(rates)


def test_the_policy_learns_what_is_rewarded(tiny_llava_dir, adapter_dir, tmp_path):
    def short(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [-len(ids) / 8 for ids in completion_ids]

    trainer = ppo_trainer(
        tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=short, train_dataset=prompt_rows(32), total_episodes=224,
        per_device_train_batch_size=16, num_ppo_epochs=2, kl_coef=0.0, temperature=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    favour_the_stop_token(trainer.policy_model)
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    assert scores[-1] > scores[0] + 0.2, scores


@pytest.fixture
def fresh_accelerator_state() -> Iterator[None]:
    """Accelerate keeps one precision for the life of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_bf16_computes_in_bf16_and_passes_the_first_steps_checks(
    tiny_llava_dir, adapter_dir, tmp_path, fresh_accelerator_state
):
    trainer = ppo_trainer(
        tiny_llava_dir, adapter_dir, tmp_path, bf16=True, use_cpu=True, local_rollout_forward_batch_size=3
    )
    seen = set()
    lm_head = trainer.accelerator.unwrap_model(trainer.model).policy.get_base_model().lm_head
    lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}  # in generation, log-probabilities and update alike
    assert trainer.state.log_history[0]["objective/kl"] == 0.0


def test_columns_reach_the_reward_function_with_their_rows(tiny_llava_dir, adapter_dir, tmp_path):
    seen = []

    def look(prompts, completions, completion_ids, images, captions, answer_type, row_name, **columns):
        seen.extend(zip(prompts, completions, images, captions, answer_type, row_name, strict=True))
        return [0.0, 1.0, 2.0, 3.0]

    ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=look).train()
    assert len(seen) == 8
    for prompt, completion, images, captions, answer_type, name in seen:
        index = int(name.split("[")[1].rstrip("]"))
        assert prompt[-1]["content"][-1]["text"] == f"What is in picture {index}?"
        assert completion[0]["role"] == "assistant" and isinstance(completion[0]["content"], str)
        assert captions == [f"caption {index}"]
        assert answer_type == ("general", "yes", "no", "A")[index % 4]
        assert len(images) == (index % 3 != 2)
        if images:
            assert images[0].getpixel((20, 20)) == ((255, 0, 0), (0, 0, 255))[index % 2]


def test_the_processor_comes_from_the_policy_and_captions_from_a_named_column(tiny_llava_dir, adapter_dir, tmp_path):
    seen = []

    def look(captions, **columns):
        seen.extend(captions)
        return [0.0, 1.0, 2.0, 3.0]

    named = prompt_rows().rename_column("captions", "facts")
    trainer = ppo_trainer(
        tiny_llava_dir,
        adapter_dir,
        tmp_path,
        processing_class=None,
        reward_funcs=look,
        train_dataset=named,
        captions_column="facts",
    )
    trainer.train()
    assert len(seen) == 8 and all(facts[0].startswith("caption ") for facts in seen)
    assert trainer.processing_class.image_token == "<image>"


def test_the_value_model_may_see_larger_pictures(tiny_llava_dir, adapter_dir, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    processor.image_processor.size = {"shortest_edge": 56}
    processor.image_processor.crop_size = {"height": 56, "width": 56}
    config = LlavaConfig.from_pretrained(tiny_llava_dir, num_labels=1)
    config.vision_config.image_size = 56
    torch.manual_seed(3)
    value = LlavaForSequenceClassification(config)
    value.requires_grad_(False)
    value.score.requires_grad_(True)
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, value_model=value, value_processing_class=processor)
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    assert rollout.value_inputs.query_length == rollout.inputs.query_length + (8 * 8 - 4 * 4)
    trainer.train()


def test_values_come_from_the_token_before_each_response_token(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    value = trainer.accelerator.unwrap_model(trainer.model).value_model
    row = next(i for i, images in enumerate(rollout.columns["images"]) if images)
    alone = rollout.select([row])
    for t in range(int(alone.mask.sum())):
        prefix = followed_by(value, alone.inputs, alone.responses[:, :t], alone.mask[:, :t])
        with torch.no_grad():
            expected = value(**prefix).logits.item()  # the head at the last real token
        assert alone.values[0, t].item() == pytest.approx(expected, abs=1e-5)


def test_padding_carries_nothing(tiny_llava_dir, adapter_dir, tmp_path):
    """A rollout with garbage behind its responses trains to the very same weights."""

    def trained(spoil: bool) -> dict[str, torch.Tensor]:
        trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
        favour_the_stop_token(trainer.policy_model)
        rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
        assert not rollout.mask.all()
        if spoil:
            rollout.responses[~rollout.mask] = 7
            for tensor in (rollout.logprobs, rollout.ref_logprobs, rollout.values):
                tensor[~rollout.mask] = 1e3
        trainer.score(rollout, 1)
        trainer.compute_advantages(rollout, 1)
        trainer.update(rollout, 1)
        return weights(trainer)

    clean, spoiled = trained(False), trained(True)
    assert all(torch.equal(spoiled[name], value) for name, value in clean.items())


def test_the_image_token_is_never_sampled_nor_counted_in_the_distribution(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    image_token = model.policy.config.image_token_id
    assert trainer.sampling.suppressed == [image_token]
    # Give the image token by far the largest logit.
    head = model.policy.get_base_model().lm_head
    head.weight.data[image_token] = head.weight.data.mean(0) * 1e3
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    assert not (rollout.responses == image_token).any()
    assert torch.isfinite(rollout.logprobs).all() and (rollout.logprobs[rollout.mask] > -30).all()


def test_save_model_writes_both_adapters_with_the_head(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained = weights(trainer)
    for key, value in saved.items():
        inside = "policy." + key.replace(".weight", ".default.weight")
        assert torch.equal(trained[inside], value)
    value_keys = load_file(tmp_path / "out" / "value_model" / "adapter_model.safetensors").keys()
    assert {key for key in value_keys if "score" in key} == {
        "base_model.model.score.weight",
        "base_model.model.score.bias",
    }
    assert not (tmp_path / "out" / "reference").exists()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    AutoProcessor.from_pretrained(tmp_path / "out")


def test_fewer_rows_than_a_batch_is_an_error_and_not_an_endless_loop(tiny_llava_dir, adapter_dir, tmp_path):
    with pytest.raises(ValueError, match="3 usable rows, fewer than the 4 of one batch"):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, train_dataset=prompt_rows(3))


def test_what_a_checkpoint_says_of_generation_does_not_shape_the_answers(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.rollout(batch, step=1).responses
    config = trainer.policy_model.get_base_model().generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.top_k = 50.0, 2, 3
    assert torch.equal(trainer.rollout(batch, step=1).responses, expected)
    assert trainer.policy_model.get_base_model().generation_config.repetition_penalty == 50.0


def test_rewards_without_spread_cannot_be_normalised(tiny_llava_dir, adapter_dir, tmp_path):
    def constant(completion_ids, **columns):
        return [0.25] * len(completion_ids)

    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=constant, normalize_scores="first_batch")
    with pytest.raises(UnhealthyRunError, match=r"constant gave every completion of the first batch 0\.25"):
        trainer.train()


def test_max_steps_and_a_callbacks_stop_end_the_run(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, total_episodes=16, callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("field", "value"), [("save_strategy", "epoch"), ("model_adapter_name", "policy"), ("fp16", True)]
)
def test_an_option_the_loop_cannot_honour_is_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must"):
        LlavaPPOConfig(output_dir=str(tmp_path), **{field: value})


def test_a_launch_that_would_train_wrongly_is_refused(tiny_llava_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ExplainedError, match="does not run under FSDP"):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)


def test_a_checkpoint_without_optimizer_says_why_a_run_cannot_go_on(tiny_llava_dir, adapter_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **settings).train()
    with pytest.raises(FileNotFoundError, match="save_only_model"):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **settings).train(resume_from_checkpoint=True)


def test_scores_are_normalised_by_the_first_batch(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, normalize_scores="first_batch", length_coef=-1.0)
    trainer.train()
    first, second = (e for e in trainer.state.log_history if "objective/kl" in e)
    assert first["rewards/even_tokens/mean"] == pytest.approx(0.0, abs=1e-5)
    assert first["rewards/even_tokens/std"] == pytest.approx(1.0, abs=1e-5)
    assert second["rewards/even_tokens/mean"] != pytest.approx(0.0, abs=1e-5)
    assert -1.0 <= first["rewards/length/mean"] < 0  # symbolic terms keep their units


def test_reward_functions_join_with_weights(tiny_llava_dir, adapter_dir, tmp_path):
    def one(completion_ids, **columns):
        return [1.0] * len(completion_ids)

    def half_opinion(completion_ids, **columns):
        return [None if i % 2 else 2.0 for i in range(len(completion_ids))]

    trainer = ppo_trainer(
        tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=[one, half_opinion], reward_weights=[3.0, 10.0],
        reward_bias=0.5,
    )  # fmt: skip
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    trainer.score(rollout, 1)
    assert rollout.scores.tolist() == [23.5, 3.5, 23.5, 3.5]
    with pytest.raises(ValueError, match="`reward_weights` has 1 entries for 2 reward functions"):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=[one, half_opinion], reward_weights=[3.0])


def test_gradient_checkpointing_changes_nothing(tiny_llava_dir, adapter_dir, tmp_path):
    plain = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    checkpointed = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, gradient_checkpointing=True)
    assert losses(plain) == losses(checkpointed)
    expected = weights(plain)
    assert all(torch.equal(expected[name], value) for name, value in weights(checkpointed).items())


def test_every_other_layer_may_be_checkpointed_and_nothing_deprecated_is_called(
    tiny_llava_dir, adapter_dir, tmp_path, recwarn
):
    kwargs = {"every_n_layers": 2}
    trainer = ppo_trainer(
        tiny_llava_dir, adapter_dir, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    for model in (trainer.policy_model, trainer.value_model):
        layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False]  # tower, then text
    assert not [str(entry.message) for entry in recwarn if "gradient_checkpointing_enable" in str(entry.message)]
    trainer.train()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_llava_dir, adapter_dir, tmp_path):
    settings = {"total_episodes": 16, "save_strategy": "steps", "save_steps": 1, "normalize_scores": "first_batch"}
    whole = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path / "whole", **settings)
    favour_the_stop_token(whole.policy_model)
    whole.train()
    resumed = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path / "whole", **settings)
    favour_the_stop_token(resumed.policy_model)
    torch.manual_seed(12345)  # nothing may depend on the global generator
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, actual = weights(whole), weights(resumed)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    timed = ("time/", "tokens_per_second", "eps")
    for first, second in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        assert {k: v for k, v in first.items() if not k.startswith(timed)} == {
            k: v for k, v in second.items() if not k.startswith(timed)
        }


def test_resuming_the_last_checkpoint_of_a_finished_run_does_nothing(tiny_llava_dir, adapter_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **settings).train()
    again = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and len(again.state.log_history) == 2


def test_resuming_from_what_is_no_checkpoint_is_an_error(tiny_llava_dir, adapter_dir, tmp_path):
    trainer = ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint \(it has no trainer_state\.json\)"):
        trainer.train(resume_from_checkpoint=str(adapter_dir))


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_captions_that_a_reward_needs_are_looked_for_before_the_first_step(
    tiny_llava_dir, adapter_dir, tmp_path, name
):
    def needy(completions, captions, **columns):
        return [float(len(facts)) for facts in captions]

    needy.needs_captions = True
    rows = prompt_rows(8)
    bare = rows.remove_columns("captions").add_column("captions", [["a"], [], ["a"], []] * 2)
    assert ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **{name: rows}, reward_funcs=needy).scorer.names == [
        "needy"
    ]
    message = rf"{name}\[1\]: it has no captions, but the reward needs them \(4 of 8 rows cannot be used"
    with pytest.raises(RowError, match=message):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **{name: bare}, reward_funcs=needy)
    needy.needs_captions = False
    ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, **{name: bare}, reward_funcs=needy)


def test_an_asynchronous_reward_is_refused_in_words(tiny_llava_dir, adapter_dir, tmp_path):
    async def slow(completions, **columns):
        return [0.0] * len(completions)

    with pytest.raises(InputError, match="reward function slow is asynchronous, which PPO does not support"):
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=slow)


def test_logprobs_of_the_draw_and_of_a_pass_of_their_own_train_alike(tiny_llava_dir, adapter_dir, tmp_path):
    settings = {"num_generations_per_prompt": 2, "temperature": 0.7}
    drawn, again = (
        ppo_trainer(tiny_llava_dir, adapter_dir, tmp_path, recompute_logprobs=recompute, **settings)
        for recompute in (None, True)
    )
    for trainer in (drawn, again):
        favour_the_stop_token(trainer.policy_model)
    assert drawn.generator.keep_logprobs and not again.generator.keep_logprobs
    for actual, expected in zip(losses(drawn), losses(again), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, value in weights(again).items():
        torch.testing.assert_close(weights(drawn)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype", "settings", "alike"),
    [
        ("no", torch.float32, {}, True),
        ("bf16", torch.float32, {}, False),
        ("no", torch.bfloat16, {}, False),
        ("no", torch.float32, {"tf32": True}, False),
        ("no", torch.float32, {"is_quantized": True}, False),
        ("no", torch.float32, {"device": "cuda"}, False),
        ("no", torch.float32, {"device": "cuda", "generation_cache_gib": 1.0}, True),
    ],
)
def test_only_in_float32_do_generation_and_passes_round_alike(precision, dtype, settings, alike):
    policy = SimpleNamespace(dtype=dtype, is_quantized=settings.get("is_quantized", False))
    args = SimpleNamespace(tf32=settings.get("tf32"), generation_cache_gib=settings.get("generation_cache_gib"))
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device(settings.get("device", "cpu")))
    assert rounds_alike(policy, args, accelerator) == alike
