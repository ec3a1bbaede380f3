"""The roles of a PPO run without their weights."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig
from trl.trainer.utils import disable_dropout_in_model

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapter_role import cast_adapters
from trl_llava.tools.plan.dry_models import add_adapter, build_classifier, build_policy
from trl_llava.tools.plan.job import Job, Settings
from trl_llava.tools.plan.memory_model import ALONE, weights
from trl_llava.tools.plan.sharing import Processes, cast_as_deepspeed
from trl_llava.tools.plan.stages import shaped
from trl_llava.tools.plan.starts import Start, base_config, find_start


@dataclass
class Roles:
    """The models of a run, on the meta device, later fake.

    Attributes:
        policy: The policy; an adapter's frozen copy is in it.
        reference: A model of its own, or None.
        value: The value model.
        reward: The reward model, or None.
        configs: Of the three bases.
        sharing: Roles whose base, tower included, is another role's.
        notes: What was taken from elsewhere.
    """

    policy: nn.Module
    reference: nn.Module | None
    value: nn.Module
    reward: nn.Module | None
    configs: dict[str, PreTrainedConfig]
    sharing: set[str]
    notes: list[str]

    def held(self, processes: Processes = ALONE, *, only: str | None = None, but: str | None = None) -> Counter[str]:
        """The weights of the roles: adapters and heads of each, and every base once (`loading/shared_base.py`).

        Args:
            processes: How they are shared out.
            only: Those of this role alone.
            but: Those of all but this role.

        Returns:
            Bytes by part.
        """
        parts: Counter[str] = Counter()
        for name in ("policy", "reference", "value", "reward"):
            model = getattr(self, name)
            if model is not None and only in (None, name) and but != name:
                own = weights(model, processes)
                if name in self.sharing:
                    del own["base"]
                parts += own
        return parts

    def config(self, role: str) -> PreTrainedConfig:
        """The config of a role's base.

        Args:
            role: policy, reference, value or reward.

        Returns:
            The config; a reference of its own has the policy's.
        """
        return self.configs["policy" if role == "reference" else role]


def load_roles(job: Job, settings: Settings) -> Roles:
    """Policy, reference, value and reward model as `ppo_roles` would load them.

    Args:
        job: The stage.
        settings: Whether bases are in 4 bits.

    Returns:
        The roles.

    Raises:
        InputError: If a model is of a kind that the plan does not know, or none is named.
        NotFoundError: If the config of a model cannot be read.
    """
    args, values = job.given(settings), job.values
    starts = _starts(job, args)
    start = starts["policy"]
    policy: nn.Module = build_policy(start.config, args)
    reference = None
    if start.has_adapter:
        policy = _with_adapter(policy, args, start, "CAUSAL_LM", frozen_copy=True)
    elif args.use_peft:
        policy = add_adapter(policy, args, task="CAUSAL_LM")
    else:
        reference = build_policy(start.config, args).requires_grad_(False)
    reward = _classifier(starts["reward"], args).requires_grad_(False) if "reward" in starts else None
    value = _classifier(starts["value"], args)
    if args.use_peft and not starts["value"].has_adapter:
        value = add_adapter(value, args, task="SEQ_CLS")
    for model in (policy, value, reward):
        if model is not None and values["adapter_dtype"] is not None:
            cast_adapters(model, getattr(torch, values["adapter_dtype"]))
    cast_as_deepspeed([model for model in (policy, reference, value) if model is not None], job.processes, job.bf16)
    adapters = {role for role, model in (("policy", policy), ("value", value)) if isinstance(model, PeftModel)}
    adapters |= {"reward"} if "reward" in starts and starts["reward"].has_adapter else set()
    sharing = _sharing(starts, adapters, job) if values["share_base"] else set()
    return Roles(
        _without_dropout(policy),
        reference,
        _without_dropout(value),
        reward,
        {role: start.config for role, start in starts.items()},
        sharing,
        list(dict.fromkeys(note for start in starts.values() for note in start.notes)),
    )


def _starts(job: Job, args: LlavaModelConfig) -> dict[str, Start]:
    """What policy, value and, where there is one, reward model start from."""
    values = job.values
    policy_field = "sft_model_path" if values["sft_model_path"] else "model_name_or_path"
    value_field = "value_model_path"
    if values["value_model_path"] is None:
        value_field = policy_field if values["value_init"] == "policy" else "reward_model_path"
    starts = {
        "policy": _start(job, policy_field, args.model_name_or_path),
        "value": _start(job, value_field, args.model_name_or_path if value_field == policy_field else None),
    }
    if values["reward_model_path"] is not None:
        starts["reward"] = _start(job, "reward_model_path", None)
    return starts


def _sharing(starts: dict[str, Start], adapters: set[str], job: Job) -> set[str]:
    """Which of the roles that have `adapters` are on another one's base: value on the policy's, reward on either's.

    Under ZeRO-3 the reward model is loaded whole, on a base of its own (`reward_loading.py`).
    """
    bases = [starts["policy"].name] if "policy" in adapters else []
    sharing: set[str] = set()
    for role in ("value", "reward"):
        if role in adapters:
            if starts[role].name in bases and not (role == "reward" and job.processes.zero_stage == 3):
                sharing.add(role)
            bases.append(starts[role].name)
    return sharing


def _start(job: Job, field: str, given: str | None) -> Start:
    revision = job.values.get(field.replace("_path", "_revision"))
    if field == "model_name_or_path":
        return base_config(job.model_args, job.sources)
    return find_start(field, job.values[field], revision, job.sources, job.model_args, given)


def _with_adapter(
    model: Any, args: LlavaModelConfig, start: Start, task: str, *, frozen_copy: bool = False
) -> nn.Module:
    return add_adapter(model, shaped(args, start.shape), task=task, trained=start.adapter, frozen_copy=frozen_copy)


def _classifier(start: Start, args: LlavaModelConfig) -> nn.Module:
    model = build_classifier(start.config, args)
    if not start.has_adapter:
        return model
    return _with_adapter(model, args, start, "SEQ_CLS")


def _without_dropout(model: nn.Module) -> nn.Module:
    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model
