"""The roles of a PPO run without their weights."""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedConfig
from trl.trainer.utils import disable_dropout_in_model

from trl_llava.configs import LlavaModelConfig
from trl_llava.dry_models import add_adapter, build_classifier, build_policy
from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub import check_there
from trl_llava.memory_model import weights
from trl_llava.models import load_config
from trl_llava.plan_stages import Job, Settings
from trl_llava.score_start import adapter_base, agreed_base


@dataclass(frozen=True)
class Start:
    """What a role starts from.

    Attributes:
        config: Of its base model.
        name: Hub ID or folder of the base.
        adapter: Config of the adapter on it; None for a whole model, or where it has yet to be written.
        to_come: Whether an earlier stage has yet to write an adapter, of the shape that the recipe's `lora_*` say.
    """

    config: PreTrainedConfig
    name: str
    adapter: LoraConfig | None = None
    to_come: bool = False

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter.

        Returns:
            Whether, there already or not.
        """
        return self.adapter is not None or self.to_come


@dataclass
class Roles:
    """The models of a run, on the meta device, later fake.

    Attributes:
        policy: The policy; an adapter's frozen copy is in it.
        reference: A model of its own, or None.
        value: The value model.
        reward: The reward model, or None.
        configs: Of the three bases.
        sharing: Roles whose base is another role's.
    """

    policy: nn.Module
    reference: nn.Module | None
    value: nn.Module
    reward: nn.Module | None
    configs: dict[str, PreTrainedConfig]
    sharing: set[str]

    def held(self) -> Counter[str]:
        """The weights of all roles: adapters and heads of each, and every base once (`shared_base.py`).

        Returns:
            Bytes by part.
        """
        parts: Counter[str] = Counter()
        for name in ("policy", "reference", "value", "reward"):
            model = getattr(self, name)
            if model is not None:
                own = weights(model)
                if name in self.sharing:
                    del own["base"]
                parts += own
        return parts


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
    start_field = "sft_model_path" if values["sft_model_path"] else "model_name_or_path"
    start = _start(job, start_field, args.model_name_or_path)
    policy: nn.Module = build_policy(start.config, args)
    reference = None
    if start.has_adapter:
        policy = _with_adapter(policy, args, start, "CAUSAL_LM", frozen_copy=True)
    elif args.use_peft:
        policy = add_adapter(policy, args, task="CAUSAL_LM")
    else:
        reference = build_policy(start.config, args).requires_grad_(False)
    value_field = "value_model_path"
    if values["value_model_path"] is None:
        value_field = start_field if values["value_init"] == "policy" else "reward_model_path"
    starts = {
        "policy": start,
        "value": _start(job, value_field, args.model_name_or_path if value_field == start_field else None),
    }
    if values["reward_model_path"] is not None:
        starts["reward"] = _start(job, "reward_model_path", None)
    reward = _classifier(starts["reward"], args).requires_grad_(False) if "reward" in starts else None
    value = _without_dropout(_classifier(starts["value"], args))
    configs = {role: start.config for role, start in starts.items()}
    sharing = _sharing(starts, isinstance(policy, PeftModel)) if values["share_base"] else set()
    return Roles(_without_dropout(policy), reference, value, reward, configs, sharing)


def _sharing(starts: dict[str, Start], policy_has_adapter: bool) -> set[str]:
    """Which roles are adapters on another one's base: value on the policy's, reward on either's."""
    bases = [starts["policy"].name] if policy_has_adapter else []
    sharing: set[str] = set()
    for role in ("value", "reward"):
        if role in starts and starts[role].has_adapter:
            if starts[role].name in bases:
                sharing.add(role)
            bases.append(starts[role].name)
    return sharing


def _start(job: Job, field: str, given: str | None) -> Start:
    """What a field names; where that has yet to be written, an adapter of the recipe's `lora_*` shape on `--base`."""
    name = job.values[field]
    revision = job.values.get(field.replace("_path", "_revision"))
    remote = job.model_args.trust_remote_code
    if name is None:
        raise InputError(f"{field} is not set; a plan needs to know the model")
    try:
        check_there(field, name, revision)
    except NotFoundError as error:
        if job.fallback is None:
            raise NotFoundError(
                f"{error}. If an earlier stage has yet to write it, give its base model with --base, and the shape "
                "of its adapter with --lora_r and --lora_target_modules"
            ) from error
        return Start(load_config("--base", job.fallback, None, remote), job.fallback, to_come=True)
    trained_on = adapter_base(name, revision)
    if trained_on is None:
        return Start(load_config(field, name, revision, remote), name)
    base = agreed_base(given, name, trained_on)
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    if not isinstance(adapter, LoraConfig):
        raise InputError(f"{field}: '{name}' is a {adapter.peft_type} adapter; a plan knows LoRA")
    return Start(load_config(field, base, None, remote), base, adapter)


def _with_adapter(
    model: Any, args: LlavaModelConfig, start: Start, task: str, *, frozen_copy: bool = False
) -> nn.Module:
    if start.to_come:
        args = copy.copy(args)
        args.use_peft = True
    return add_adapter(model, args, task=task, trained=start.adapter, frozen_copy=frozen_copy)


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
