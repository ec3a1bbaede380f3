"""The roles of a PPO run without their weights."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapter_role import cast_adapters
from trl_llava.tools.plan.dry_models import add_adapter, build_classifier, build_policy, shaped
from trl_llava.tools.plan.formulas import ALONE, cast_as_deepspeed, weights
from trl_llava.tools.plan.job import Job, Settings
from trl_llava.tools.plan.processes import Processes
from trl_llava.tools.plan.starts import Start, base_config, find_start


@dataclass
class Roles:
    """The models of a run, on the meta device, later without memory."""

    policy: nn.Module  # an adapter's frozen copy is in it
    reference: nn.Module | None  # a model of its own
    value: nn.Module
    reward: nn.Module | None
    configs: dict[str, PreTrainedConfig]  # of the three bases
    sharing: set[str]  # roles whose base, tower included, is another role's
    notes: list[str]  # what was taken from elsewhere

    def named(self) -> dict[str, nn.Module]:
        """The models that there are."""
        names = ("policy", "reference", "value", "reward")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def held(self, processes: Processes = ALONE, *, only: str | None = None, but: str | None = None) -> Counter[str]:
        """Bytes by part of all roles, of `only` one or all `but` one: adapters and heads of each, every base once."""
        parts: Counter[str] = Counter()
        for name, model in self.named().items():
            if only in (None, name) and but != name:
                own = weights(model, processes)
                if name in self.sharing:
                    del own["base"]
                parts += own
        return parts

    def config(self, role: str) -> PreTrainedConfig:
        """The config of a role's base; a reference of its own has the policy's."""
        return self.configs["policy" if role == "reference" else role]


def load_roles(job: Job, settings: Settings) -> Roles:
    """Policy, reference, value and reward model as PPO would load them."""
    model_args, args = job.with_bits(settings), job.args
    starts = _starts(job, model_args)
    start = starts["policy"]
    policy: nn.Module = build_policy(start.config, model_args)
    reference = None
    if start.has_adapter:
        policy = _with_adapter(policy, model_args, start, "CAUSAL_LM", frozen_copy=True)
    elif model_args.use_peft:
        policy = add_adapter(policy, model_args, task="CAUSAL_LM")
    else:
        reference = build_policy(start.config, model_args).requires_grad_(False)
    reward = _classifier(starts["reward"], model_args).requires_grad_(False) if "reward" in starts else None
    value = _classifier(starts["value"], model_args)
    if model_args.use_peft and not starts["value"].has_adapter:
        value = add_adapter(value, model_args, task="SEQ_CLS")
    for model in (policy, value, reward):
        if model is not None and args.adapter_dtype is not None:
            cast_adapters(model, getattr(torch, args.adapter_dtype))
    cast_as_deepspeed([model for model in (policy, reference, value) if model is not None], job.processes, job.bf16)
    adapters = {role for role, model in (("policy", policy), ("value", value)) if isinstance(model, PeftModel)}
    adapters |= {"reward"} if "reward" in starts and starts["reward"].has_adapter else set()
    return Roles(
        policy,
        reference,
        value,
        reward,
        {role: start.config for role, start in starts.items()},
        _sharing(starts, adapters, job) if args.share_base else set(),
        list(dict.fromkeys(note for start in starts.values() for note in start.notes)),
    )


def _starts(job: Job, model_args: LlavaModelConfig) -> dict[str, Start]:
    """What policy, value and, where there is one, reward model start from."""
    args = job.args
    policy_field = "sft_model_path" if args.sft_model_path else "model_name_or_path"
    value_field = "value_model_path"
    if args.value_model_path is None:
        value_field = policy_field if args.value_init == "policy" else "reward_model_path"
    base = model_args.model_name_or_path
    starts = {
        "policy": _start(job, policy_field, base),
        "value": _start(job, value_field, base if value_field == policy_field else None),
    }
    if args.reward_model_path is not None:
        starts["reward"] = _start(job, "reward_model_path", None)
    if value_field == "reward_model_path" and starts["value"].config.model_type != starts["policy"].config.model_type:
        starts["value"] = _start(job, policy_field, base)  # as a run does where it reads other tokens
    return starts


def _start(job: Job, field: str, given: str | None) -> Start:
    if field == "model_name_or_path":
        return base_config(job.model_args, job.sources)
    revision = getattr(job.args, field.replace("_path", "_revision"))
    return find_start(field, getattr(job.args, field), revision, job.sources, job.model_args, given)


def _sharing(starts: dict[str, Start], adapters: set[str], job: Job) -> set[str]:
    """Which of the roles that have `adapters` are on another one's base: value on the policy's, reward on either's.

    Under ZeRO-3 the reward model is loaded whole, on a base of its own.
    """
    bases = [starts["policy"].name] if "policy" in adapters else []
    sharing: set[str] = set()
    for role in ("value", "reward"):
        if role in adapters:
            if starts[role].name in bases and not (role == "reward" and job.processes.zero_stage == 3):
                sharing.add(role)
            bases.append(starts[role].name)
    return sharing


def _classifier(start: Start, model_args: LlavaModelConfig) -> nn.Module:
    model = build_classifier(start.config, model_args)
    return _with_adapter(model, model_args, start, "SEQ_CLS") if start.has_adapter else model


def _with_adapter(
    model: Any, model_args: LlavaModelConfig, start: Start, task: str, *, frozen_copy: bool = False
) -> nn.Module:
    shape = shaped(model_args, start.shape)
    return add_adapter(model, shape, task=task, trained=start.adapter, frozen_copy=frozen_copy)
