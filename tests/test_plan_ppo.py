"""The plan of PPO: held against the bytes that each phase of real steps holds on the CPU, at toy size."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_trainers
import torch
from measured import fields_for, longest, phases_of, question, with_pictures
from torch import nn
from transformers import AutoProcessor

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.load import load_sequence_classifier
from trl_llava.ppo import role_passes
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.plan.command import need_of
from trl_llava.tools.plan.job import Job, Need, Settings
from trl_llava.tools.plan.processes import Processes
from trl_llava.tools.plan.roles import load_roles
from trl_llava.train_ppo import load_all


def plan_of(trainer: Any, base: Path, adapter: Path, **changes: Any) -> Need:
    args = copy.copy(trainer.args)
    args.sft_model_path, args.value_init, args.share_base = str(adapter), "policy", False
    args.reward_model_path = changes.pop("reward_model_path", None)
    job = Job("ppo", args, fields_for(base, use_peft=False), Processes(), 1, longest(trainer), **changes)
    rows = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    return need_of(job, Settings(*rows, False, False, args.local_rollout_forward_batch_size))


def on_a_cpu(need: Need) -> dict[str, int]:
    """Where a pass finds its pictures in the memory that they are kept in: none are copied, and all are there."""
    kept = need.host["image features of a step"]
    found = {moment.phase: moment.total - moment.parts["image features"] + kept for moment in need.moments}
    images = next(moment for moment in need.moments if moment.phase == "images")
    return found | {"images": images.total + kept}


def step(base: Path, folder: Path, **changes: Any) -> tuple[Any, Path]:
    adapter = tiny_trainers.make_adapter(base, folder / "adapter")
    count = 4 // changes.get("num_generations_per_prompt", 1)
    settings = {"response_length": 48, "total_episodes": 4, "local_rollout_forward_batch_size": 4, **changes}
    rows = with_pictures(prompt=[question(30 - i) for i in range(count)], captions=[["a"]] * count)
    return tiny_trainers.ppo_trainer(base, adapter, folder / "run", train_dataset=rows, **settings), adapter


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_implementation": "dynamic"},
        {"num_generations_per_prompt": 2},
        {"num_generations_per_prompt": 2, "num_mini_batches": 2, "seed": 3},
        {"max_tokens_per_micro_batch": 640},
        {"max_tokens_per_micro_batch": 420, "num_generations_per_prompt": 2},
        {"generation_cache_gib": 3 * 384 * 380 / 2**30},
    ],
    ids=lambda changes: ",".join(changes) or "defaults",
)
def test_ppo_needs_what_is_planned(tiny_llava_dir, tmp_path, monkeypatch, changes):
    # In inference mode the trace would not see what attention allocates.
    monkeypatch.setattr(role_passes, "is_deepspeed_zero3_enabled", lambda: True)
    trainer, adapter = step(tiny_llava_dir, tmp_path, **changes)
    rollout, made = trainer.rollout, []

    def count_features(*given: Any) -> Any:
        found = rollout(*given)
        features = [one for given in (found.inputs, found.value_inputs) for row in given.features.rows for one in row]
        made.append(sum(one.nbytes for one in {id(one): one for one in features}.values()))
        return found

    trainer.rollout = count_features
    measured = phases_of(trainer)
    need = plan_of(trainer, tiny_llava_dir, adapter)
    plan = on_a_cpu(need)
    assert made == [need.host["image features of a step"]]
    for name, own in (("generation", "generation"), ("forward", "passes"), ("update", "update")):
        assert plan[own] == pytest.approx(measured[name], rel=0.15), name
    assert max(plan.values()) == pytest.approx(max(measured.values()), rel=0.15)


@pytest.mark.parametrize(("judged", "budget"), [(True, None), (False, None), (True, 900)])
def test_rewards_need_what_is_planned(tiny_llava_dir, tmp_path, monkeypatch, judged, budget):
    monkeypatch.setattr(role_passes, "is_deepspeed_zero3_enabled", lambda: True)
    model = load_sequence_classifier(str(tiny_llava_dir), LlavaModelConfig(dtype="float32")).requires_grad_(False)
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    reward = FactualReward(model, processor, JudgingPrompt() if judged else None, batch_size=4)
    reward.max_tokens = budget
    reward.save_pretrained(tmp_path / "reward")
    lengths: list[int] = []
    seen = model.register_forward_pre_hook(
        lambda model, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    trainer, adapter = step(tiny_llava_dir, tmp_path, reward_funcs=reward, max_tokens_per_micro_batch=budget)
    # In inference mode the trace would not see what attention allocates.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
    measured = phases_of(trainer, model)
    seen.remove()
    changes = {"reward_model_path": str(tmp_path / "reward"), "judged_length": max(lengths)}
    need = plan_of(trainer, tiny_llava_dir, adapter, **changes)
    assert on_a_cpu(need)["rewards"] == pytest.approx(measured["score"], rel=0.15)


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_value_model_from_a_whole_model_is_planned_as_it_is_loaded(tiny_llava_dir, tmp_path, use_peft):
    words = {"model_name_or_path": str(tiny_llava_dir), "use_peft": use_peft, "lora_r": 2, "dtype": "float32"}
    args = LlavaPPOConfig(
        output_dir=str(tmp_path), value_init="policy", length_coef=-1.0, report_to=[], bf16=False, use_cpu=True
    )
    roles = load_roles(
        Job("ppo", args, LlavaModelConfig(**words), Processes(), 1, 40), Settings(1, 1, False, False, 1)
    )
    assert roles.sharing == ({"value"} if use_peft else set())
    policy, value, _ = load_all(args, LlavaModelConfig(**words))
    planned, loaded = nn.ModuleList([roles.policy, roles.value]), nn.ModuleList([policy.model, value.model])
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (planned, loaded)]
    assert counts[0] == counts[1]
