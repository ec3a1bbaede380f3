"""LoRA adapters: where they go, and how they are loaded, so that one base model serves many roles."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel
from trl import get_peft_config

from trl_llava.configs.recipe import nearest
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub.lookup import check_there, find_file, not_found
from trl_llava.models.base_model import base_of
from trl_llava.models.load import HEAD
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES, lies_in, part_of

logger = logging.getLogger(__name__)


def lora_config(
    model_args: LlavaModelConfig, model: nn.Module, *, task: Literal["CAUSAL_LM", "SEQ_CLS"]
) -> LoraConfig | None:
    """The LoRA configuration for a model, by default on every linear layer of its language model; None without LoRA.

    `lora_target_modules` may hold names (`[q_proj, v_proj]`), which mean layers of the language model: the tower has a
    `q_proj` too. A regular expression is taken as it is. A projector or tower that is not frozen is trained whole,
    beside the adapter; with task SEQ_CLS so is the score head.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    config.task_type = task
    if model_args.model_revision != "main" and not Path(str(model_args.model_name_or_path)).exists():
        config.revision = model_args.model_revision  # PEFT's name for the revision of the base
    config.target_modules = _lora_targets(model, model_args.lora_target_modules)
    frozen = {"tower": model_args.freeze_vision_tower, "projector": model_args.freeze_projector}
    matched = [name for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)]
    wrong = [name for name in matched if frozen.get(part_of(name))]
    if wrong or not matched:
        found = f"{len(wrong)} modules of frozen parts, e.g. {wrong[0]}" if wrong else "nothing"
        raise InputError(
            f"lora_target_modules={config.target_modules!r} matches {found}. Leave it out for the language model's "
            "linear layers, or set freeze_vision_tower or freeze_projector to false"
        )
    whole = [*(model_args.lora_modules_to_save or [])]
    modules, parameters = (dict(found()) for found in (model.named_modules, model.named_parameters))
    for field, names, known in (
        ("lora_target_modules", model_args.lora_target_modules, modules),
        ("lora_modules_to_save", whole, modules),
        ("lora_target_parameters", model_args.lora_target_parameters, parameters),
    ):
        for name in names if isinstance(names, list) else ():
            if not any(path == name or path.endswith(f".{name}") for path in known):
                raise InputError(f"`{field}`: the model has no {name!r}{nearest(name, _last_names(known))}")
    if task == "SEQ_CLS":
        whole.append(HEAD)
    adapted = {part_of(name) for name in matched}
    whole += _trained_whole(model, {part for part, is_frozen in frozen.items() if not is_frozen} - adapted)
    config.modules_to_save = sorted(set(whole)) or None
    return config


def load_adapter(
    model: PreTrainedModel | PeftModel,
    name: str,
    *,
    adapter_name: str = "default",
    is_trainable: bool,
    revision: str | None = None,
    field: str = "adapter",
) -> PeftModel:
    """Put a trained adapter on a base model, or one more on a PEFT model; every weight must have its place.

    The first adapter of a model becomes the active one. What is trainable in adapters that are there already, and
    whether the model is in train mode, stays as it was. `field` is the recipe's that names it, for the message.
    """
    check_there(field, name, revision)
    check_safe_adapter(name, revision)
    if find_file(name, "adapter_config.json", revision) is None:
        raise InputError(f"'{name}' is no adapter: it has no adapter_config.json. Is it a whole model?")
    try:
        config = PeftConfig.from_pretrained(name, revision=revision)
        keys = load_peft_weights(name, device="cpu", revision=revision).keys()
    except (OSError, ValueError) as error:
        raise NotFoundError(not_found("adapter", name, revision, error)) from error
    base = base_of(model)
    _check_head(name, base, any(HEAD in key.split(".") for key in keys))
    trained_on, was_training = config.base_model_name_or_path, model.training
    config.inference_mode = not is_trainable
    try:
        if not isinstance(model, PeftModel):
            model = get_peft_model(model, config, adapter_name=adapter_name)
        result = model.load_adapter(name, adapter_name, is_trainable=is_trainable, revision=revision)
        problem = [f"{kind} {key}" for kind in ("missing", "unexpected") for key in getattr(result, f"{kind}_keys")]
    except (KeyError, RuntimeError, ValueError) as error:
        problem = [f"{type(error).__name__}: {error}"]
    if problem:
        raise InputError(
            f"adapter '{name}' does not fit model '{base.name_or_path}' ({type(base).__name__}): it was trained on "
            f"'{trained_on}'. Load it on that base, or train an adapter for this one. First of {len(problem)} "
            f"problems: {' '.join(problem[0].split())[:400]}"
        )
    if trained_on and Path(trained_on).name != Path(base.name_or_path).name:
        logger.warning("Adapter '%s' was trained on '%s' and is put on '%s'.", name, trained_on, base.name_or_path)
    return model.train(was_training)


def check_safe_adapter(name: str, revision: str | None = None) -> None:
    """Refuse an adapter that has its weights as a pickle only."""
    safe, pickled = (find_file(name, f"adapter_model.{suffix}", revision) for suffix in ("safetensors", "bin"))
    if safe is None and pickled is not None:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"adapter '{name}' has its weights as a pickle only (adapter_model.bin), which may run code when it is "
            f"loaded. Convert it, which reads nothing but tensors: `trl-llava convert {name} DST --base BASE{at}`"
        )


def _last_names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def freeze_as_configured(
    model: PeftModel, name: str, model_args: LlavaModelConfig, adapter_name: str = "default"
) -> PeftModel:
    """Apply `freeze_vision_tower` and `freeze_projector` to a trainable adapter; others in the model are left alone.

    A part that shall be trained and is not in the adapter is an error: only what is in it is trained and saved.
    """
    for field, part in (("freeze_vision_tower", "tower"), ("freeze_projector", "projector")):
        there = [(path, parameter) for path, parameter in model.named_parameters() if part_of(path) == part]
        trained = [p for path, p in there if p.requires_grad and adapter_name in path.split(".")]
        if getattr(model_args, field):
            for parameter in trained:
                parameter.requires_grad_(False)
        elif there and not trained:
            raise InputError(
                f"`{field}: false` cannot be honoured: adapter '{name}' has no weights of that part, and only what is "
                f"in an adapter is trained and saved. Leave `{field}` true, or start from a fresh adapter"
            )
    return model


def _check_head(name: str, base: nn.Module, adapter_has_head: bool) -> None:
    """Raise if exactly one of adapter and model has a score head; PEFT would go on with a random or without one."""
    if hasattr(base, HEAD) and not adapter_has_head:
        raise no_head(name)
    if adapter_has_head and not hasattr(base, HEAD):
        raise InputError(
            f"adapter '{name}' is a reward model's (it has a score head), but '{base.name_or_path}' is loaded as a "
            f"{type(base).__name__}. Use it as the reward model, and an adapter from SFT or PPO here"
        )


def no_head(name: str) -> InputError:
    """The error for an adapter that lacks a score head."""
    return InputError(
        f"adapter '{name}' has no score head ({HEAD}.weight is not in its weights), so its scores would be random. "
        "Use a trained reward model's adapter; a policy's adapter has none"
    )


def _lora_targets(model: nn.Module, wanted: str | list[str] | None) -> str:
    """The regular expression that PEFT matches whole module names with; it is stored in adapter_config.json."""
    if isinstance(wanted, str) and wanted != "all-linear" and not wanted.isidentifier():
        return wanted
    base = base_of(model)
    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder).split(".")[-1]
    if wanted in (None, "all-linear"):
        linears = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
        # Where an adapter is already, a layer is its `base_layer`, beside the adapter's own layers.
        own = [name.removesuffix(".base_layer") for name in linears if "lora_" not in name]
        wanted = sorted({name.split(".")[-1] for name in own})
    names = [wanted] if isinstance(wanted, str) else wanted
    return rf"(?:.*\.)?{prefix}\..*\.({'|'.join(map(re.escape, names))})"


def _trained_whole(model: nn.Module, parts: set[str]) -> list[str]:
    """Names, for PEFT's `modules_to_save`, of the modules that are these parts of a model."""
    inside = any(part_of(name) == "projector" and lies_in(name, TOWER_NAMES) for name, _ in model.named_modules())
    if inside and parts == {"tower"}:  # Qwen-VL's
        raise InputError(
            "`freeze_vision_tower: false`: the projector of this family lies inside its tower, which is trained and "
            "saved whole. Set `freeze_projector: false` too, or leave the tower frozen"
        )
    names = [*TOWER_NAMES] * ("tower" in parts)
    names += [*PROJECTOR_NAMES] * ("projector" in parts and not (inside and "tower" in parts))
    return [found for name in names for found in _present(model, name)]


def _present(model: nn.Module, name: str) -> list[str]:
    """A name, if the model has a module of it; of a list of modules, which PEFT cannot save as one, those in it."""
    for path, module in model.named_modules():
        if path.split(".")[-1] == name:
            return [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return []
