"""Which roles share a base: value and reward models as adapters on a model that is loaded once.

A policy and a `...ForSequenceClassification` of the same checkpoint have the same headless model under the same names,
so a reward model's adapter fits on the policy's PEFT model; its score head is kept beside it. The base is in memory
once, whatever the number of roles.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import nn
from transformers import AutoModelForSequenceClassification

from trl_llava.errors import InputError
from trl_llava.models.adapter_role import HEAD_KEY, AdapterRole
from trl_llava.models.adapters import check_safe_adapter, no_head
from trl_llava.models.load import HEAD
from trl_llava.models.sequence_classification import ImageTextForSequenceClassification

logger = logging.getLogger(__name__)

HEADS = (HEAD, "classifier")  # PEFT takes both names for the head of a classifier, and saves them in its configuration


class SharedBase(NamedTuple):
    """A PEFT model that roles may be put on."""

    model: PeftModel
    name: str  # Hub ID or folder of its base
    revision: str | None  # of the base, if the recipe names one


def find_shared_base(
    bases: Sequence[SharedBase],
    role: str,
    adapter: str | None,
    base: str,
    base_revision: str | None,
    revision: str | None,
) -> SharedBase | None:
    """The first of the loaded models that an adapter, or a fresh one (None), can be put on; else the log says why not.

    `base` and `base_revision` are what the adapter was trained on; `role` names it in the log ("value model").
    """
    reasons = []
    for loaded in bases:
        config = None if adapter is None else PeftConfig.from_pretrained(adapter, revision=revision)
        reason = _why_not(loaded, base, base_revision, config)
        if reason is None:
            return loaded
        reasons.append(reason)
    if reasons:
        logger.warning("The %s gets a base of its own (%s): %s.", role, base, "; ".join(dict.fromkeys(reasons)))
    return None


def _why_not(loaded: SharedBase, base: str, base_revision: str | None, config: PeftConfig | None) -> str | None:
    """Why an adapter, or a fresh one, cannot be put on a loaded model; None if it can."""
    paths = Path(base), Path(loaded.name)
    if base != loaded.name and not (all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()):
        return f"{loaded.name} is loaded, another model"
    commit = getattr(loaded.model.config, "_commit_hash", None)
    if not paths[0].is_dir() and (base_revision or "main") not in (loaded.revision or "main", commit):
        return f"revision {base_revision or 'main'} is wanted, and {loaded.revision or 'main'} ({commit}) is loaded"
    with_head = AutoModelForSequenceClassification._model_mapping.get(type(loaded.model.config), None)
    if with_head is None or not issubclass(with_head, ImageTextForSequenceClassification):
        return f"a {loaded.model.config.model_type} model's score head is not one of ours"
    others = [(f"adapter '{name}'", other) for name, other in loaded.model.peft_config.items()]
    for what, adapter in [*([] if config is None else [("its adapter", config)]), *others]:
        if (reason := _keeps_to_itself(adapter)) is not None:
            return f"{what} {reason}"
    return None


def _keeps_to_itself(config: PeftConfig) -> str | None:
    """Why no other adapter can be on the same base; None for plain LoRA, with or without modules saved beside it."""
    if not isinstance(config, LoraConfig):
        return f"is of type {config.peft_type}, only LoRA shares a base"
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        return f"changes the base's weights (init_lora_weights={config.init_lora_weights!r})"
    for field in ("trainable_token_indices", "target_parameters"):
        if getattr(config, field, None):
            return f"has `{field}`, which switches with nothing else"
    return f"trains the base's biases (bias={config.bias!r})" if config.bias != "none" else None


def add_role(
    loaded: SharedBase,
    name: str,
    adapter_name: str,
    *,
    is_trainable: bool,
    revision: str | None = None,
    new_head: bool = True,
) -> AdapterRole:
    """Put a score-head adapter on a model that is loaded already; what is active and trainable in it stays as it was.

    `name` is a reward model's adapter, or a policy's, which gets a head at zero, or is an error without `new_head`.
    """
    host, base = loaded.model, loaded.model.get_base_model()
    check_safe_adapter(name, revision)
    weights = load_peft_weights(name, device="cpu", revision=revision)
    saved = PeftConfig.from_pretrained(name, revision=revision)
    has_head = any(key.startswith(HEAD_KEY) for key in weights)
    if not (has_head or new_head):
        raise no_head(name)
    saved.task_type, saved.inference_mode = "SEQ_CLS", not is_trainable
    saved.modules_to_save = [*dict.fromkeys([*(saved.modules_to_save or []), *HEADS])]
    config, head = (copy.deepcopy(saved), None) if hasattr(base, HEAD) else _with_head_beside(host, saved)
    if not has_head:
        weights[f"{HEAD_KEY}weight"] = torch.zeros(1, base.config.get_text_config().hidden_size)
        weights[f"{HEAD_KEY}bias"] = torch.zeros(1)
    try:
        with _all_else_as_it_was(host, adapter_name, is_trainable=is_trainable):
            host.add_adapter(adapter_name, config)
        role = AdapterRole(host, adapter_name, head, saved)
        problems = role.load_weights(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    if problems:
        raise InputError(
            f"adapter '{name}' does not fit model '{base.name_or_path}' ({type(base).__name__}), whose base it was to "
            f"share: {' '.join(problems[0].split())[:400]} (first of {len(problems)} problems). Set `share_base: "
            "false`, or use an adapter of that base"
        )
    role.requires_grad_(is_trainable)
    return role


def add_fresh_role(loaded: SharedBase, config: LoraConfig, adapter_name: str, *, seed: int) -> AdapterRole:
    """Put a fresh trainable adapter, with a head at zero, on a loaded model without a score head.

    What is active and trainable in the model stays as it was; `config` comes out as it is saved.
    """
    host = loaded.model
    config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), *HEADS])]
    without_head, head = _with_head_beside(host, config)
    with _all_else_as_it_was(host, adapter_name, is_trainable=True), torch.random.fork_rng():
        torch.manual_seed(seed)
        host.add_adapter(adapter_name, without_head)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return AdapterRole(host, adapter_name, head, config)


@contextmanager
def _all_else_as_it_was(host: PeftModel, adapter_name: str, *, is_trainable: bool) -> Iterator[None]:
    """Keep mode and gradients of a model while an adapter is put on it; the adapter itself is trainable or not."""
    before, training = {parameter: parameter.requires_grad for parameter in host.parameters()}, host.training
    yield
    for path, parameter in host.named_parameters():
        mine = adapter_name in path.split(".")
        parameter.requires_grad_(is_trainable if mine else before.get(parameter, False))
    host.train(training)


def _with_head_beside(host: PeftModel, saved: LoraConfig) -> tuple[LoraConfig, nn.Linear]:
    """For a host that has no score head: the adapter's configuration without one, and a head that stands beside it."""
    base = host.get_base_model()
    config = copy.deepcopy(saved)
    config.modules_to_save = [module for module in saved.modules_to_save or [] if module not in HEADS] or None
    config.task_type = host.peft_config[host.active_adapter].task_type
    embedding = base.get_input_embeddings().weight
    width = base.config.get_text_config().hidden_size
    return config, nn.Linear(width, 1, device=embedding.device, dtype=embedding.dtype)
