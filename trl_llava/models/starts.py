"""What a stage starts from: a processor, a policy, or a model with a score head, out of a base and an adapter."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, RecipeError
from trl_llava.hub.lookup import check_there, find_file, local_base
from trl_llava.models.adapters import check_safe_adapter, freeze_as_configured, load_adapter, lora_config
from trl_llava.models.load import HEAD, load_policy, load_processor, load_sequence_classifier
from trl_llava.models.sharded_weights import whole


def load_recipe_processor(model_args: LlavaModelConfig, chat_template_path: str | None) -> ProcessorMixin:
    """The processor of `model_name_or_path`, with the recipe's `pad_to_square` and chat template."""
    return load_processor(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        pad_to_square=model_args.pad_to_square,
        chat_template_path=chat_template_path,
    )


def load_policy_start(model_args: LlavaModelConfig) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """The policy with the recipe's adapter to train further, or with the configuration of a fresh one."""
    model = load_policy(model_args)
    if model_args.adapter_name_or_path is None:
        return model, lora_config(model_args, model, task="CAUSAL_LM")
    adapter, revision = model_args.adapter_name_or_path, model_args.adapter_revision
    model = load_adapter(model, adapter, is_trainable=True, revision=revision, field="adapter_name_or_path")
    return freeze_as_configured(model, adapter, model_args), None


def adapter_base(name: str, revision: str | None = None) -> str | None:
    """Hub ID or folder of the base that an adapter was trained on; None if `name` is not an adapter."""
    check_there("model or adapter", name, revision)
    if find_file(name, "adapter_config.json", revision) is None:
        return None
    return local_base(name, PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path)


def agreed_base(given: str | None, adapter: str, trained_on: str | None) -> str:
    """The base model to load an adapter on: the one it was trained on, which must be the recipe's if that names one.

    A base that the adapter names by a path that is not there gives way to the recipe's.
    """
    if not given and not trained_on:
        raise RecipeError(f"adapter {adapter} names no base model: set `model_name_or_path`.")
    if not given or not trained_on:
        return given or str(trained_on)
    # A path that is not here, or the mere name of one: pushed adapters hold that.
    gone = Path(trained_on).is_absolute() or trained_on == Path(given).name
    gone = gone and not Path(trained_on).exists()
    if given == trained_on or gone or (Path(given).is_dir() and Path(given).resolve() == Path(trained_on).resolve()):
        return given
    raise RecipeError(
        f"`model_name_or_path` is {given}, but adapter {adapter} was trained on {trained_on}: leave "
        "`model_name_or_path` out, or choose an adapter of that base."
    )


def revision_of_base(base: str, adapter: str, revision: str | None, model_args: LlavaModelConfig) -> str | None:
    """Which revision of its base an adapter belongs on: the one it was trained on, if that is known.

    `model_revision` of the recipe comes first, if it names the same base and another revision than "main".
    """
    if base == model_args.model_name_or_path and model_args.model_revision not in (None, "main"):
        return model_args.model_revision
    return PeftConfig.from_pretrained(adapter, revision=revision).revision


def load_score_model(
    name: str,
    model_args: LlavaModelConfig,
    *,
    base: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    new_head: bool = True,
) -> PreTrainedModel | PeftModel:
    """Load a trainable model with a score head: a PEFT model if `name` is an adapter.

    `name` is a base model, a checkpoint with a head, a reward model's adapter or a policy's. `base` is the recipe's
    base model of an adapter. A start without a head gets a new one from `seed`, or is an error without `new_head`.
    """
    trained_on = adapter_base(name, revision)
    if trained_on is None:
        return load_sequence_classifier(name, model_args, revision=revision, new_head=new_head, seed=seed)
    base = agreed_base(base, name, trained_on)
    base_revision = revision_of_base(base, name, revision, model_args)
    model = load_sequence_classifier(base, model_args, revision=base_revision, seed=seed)
    check_safe_adapter(name, revision)
    weights = load_peft_weights(name, device="cpu", revision=revision)
    if not new_head or any(HEAD in key.split(".") for key in weights):
        return freeze_as_configured(load_adapter(model, name, is_trainable=True, revision=revision), name, model_args)
    with whole(model.score.parameters()):
        head = {key: value.clone() for key, value in model.score.state_dict().items()}
    weights |= {f"base_model.model.{HEAD}.{key}": value for key, value in head.items()}
    config = PeftConfig.from_pretrained(name, revision=revision)
    config.task_type, config.inference_mode = "SEQ_CLS", False
    config.modules_to_save = [*(config.modules_to_save or []), HEAD]
    peft_model = get_peft_model(model, config)
    result = set_peft_model_state_dict(peft_model, weights)
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    wrong = [*result.unexpected_keys, *missing]
    if wrong:
        raise InputError(
            f"adapter {name} does not fit {base} ({type(model).__name__}): {len(wrong)} weights have no counterpart, "
            f"first {wrong[0]}."
        )
    return freeze_as_configured(peft_model, name, model_args)


def zero_head(model: nn.Module) -> None:
    """Set the score head to zero, so that a value model starts at value 0 (paper, section on PPO)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if HEAD in name.split("."):
                with whole([parameter]):
                    parameter.zero_()


def with_base(model_args: LlavaModelConfig, name: str, revision: str | None) -> LlavaModelConfig:
    """A copy of a model config for another checkpoint; `revision` None is the default branch."""
    changed = copy.copy(model_args)
    changed.model_name_or_path, changed.model_revision = name, revision or "main"
    return changed
