"""Load policy, reward and value models and their processors by Hub ID or folder.

What a checkpoint lacks is an error here: weights that were not in it, a score head, a chat template. The one exception
is the head of a reward model that is about to be trained, which is drawn from a seed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

import trl_llava.models.sequence_classification  # noqa: F401  registers the score-head models
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, MissingPackageError, NotFoundError
from trl_llava.hub.lookup import check_there, find_file, not_found
from trl_llava.models.chat_templates import end_at_turns, set_chat_template
from trl_llava.models.families import FAMILIES, family_of_processor
from trl_llava.models.fit_processor import fit_to_model
from trl_llava.models.processor_quirks import without_quirks
from trl_llava.models.quantization import keep_differentiable, quantization_config
from trl_llava.models.sharded_weights import whole
from trl_llava.models.vision_tower import TOWER_NAMES, freeze_vision, set_square_padding

HEAD = "score"
VALUE_HEAD_FILE = "value_head.safetensors"


def load_processor(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    pad_to_square: bool | None = None,
    chat_template_path: str | None = None,
    field: str = "model_name_or_path",
) -> ProcessorMixin:
    """The processor of an image-text model: tokenizer, image processor and chat template.

    Args:
        name: Hub ID or folder, of a model or of a stage's output.
        revision: Branch, tag or commit.
        trust_remote_code: Run code that the repository brings along.
        pad_to_square: Pad images to a square as the paper does; None leaves the image processor as it was saved.
        chat_template_path: Chat template instead of the saved one, as for `chat_templates.set_chat_template`.
        field: The recipe's field that names it, for the message if it is not there.

    Returns:
        The processor.

    Raises:
        OSError: If there is no such model or chat template.
        ImportError: If the processor needs a package that is not installed.
        ValueError: If a part is missing that training needs; the message names it.
    """
    check_there(field, name, revision)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        # Not `backend="pil"` above: it would reach the video processor too, which exists for torchvision only.
        if getattr(getattr(processor, "image_processor", None), "backend", None) == "torchvision":
            processor.image_processor = load_image_processor(name, revision, trust_remote_code)
    except ImportError as error:
        raise MissingPackageError(
            f"the processor of '{name}' needs a package that is not installed (the video parts of many families need "
            f"torchvision: `pip install trl-llava[vlm]`). The cause: {str(error).strip().splitlines()[0]}"
        ) from error
    except (OSError, ValueError) as error:
        _say_if_text_only(field, name, revision, trust_remote_code)
        raise NotFoundError(not_found(f"{field} (its processor)", name, revision, error)) from error
    if isinstance(processor, PreTrainedTokenizerBase) or not hasattr(processor, "image_processor"):
        raise InputError(
            f"'{name}' has no image processor, only a {type(processor).__name__}: it is a text-only model. Choose an "
            "image-text model, or put one together with trl_llava.models.assemble.assemble_llava"
        )
    family = family_of_processor(processor)
    if chat_template_path is not None:
        set_chat_template(processor, chat_template_path, trust_remote_code=trust_remote_code)
    elif not getattr(processor, "chat_template", None) and family is not None and family.chat_template is not None:
        processor.chat_template = family.chat_template
    tokenizer = getattr(processor, "tokenizer", None)
    missing = {
        "tokenizer": tokenizer is None,
        "chat template (chat_template.jinja)": not getattr(processor, "chat_template", None),
        "pad token": tokenizer is not None and tokenizer.pad_token_id is None,
        "end-of-sequence token": tokenizer is not None and tokenizer.eos_token_id is None,
        "image token": getattr(processor, "image_token", None) is None,
    }
    if any(missing.values()):
        parts = ", ".join(part for part, is_missing in missing.items() if is_missing)
        raise InputError(
            f"the processor of '{name}' ({type(processor).__name__}) has no {parts}. Load it, set what is missing "
            "(a chat template also by `chat_template_path: vicuna_v1` in the recipe; "
            "processor.tokenizer.pad_token = '<unk>'), save it to a folder, and use that folder"
        )
    without_quirks(processor)
    end_at_turns(processor)
    fit_to_model(processor, name, revision, trust_remote_code)
    if pad_to_square is not None:
        set_square_padding(processor, pad_to_square)
    return processor


def _say_if_text_only(field: str, name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Without an image processor, a model that needs none would seem to lack files."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return
    _check_takes_images(field, name, config)


def _check_takes_images(field: str, name: str, config: PreTrainedConfig) -> None:
    known = type(config) in AutoModelForImageTextToText._model_mapping or "AutoModelForImageTextToText" in (
        getattr(config, "auto_map", None) or {}
    )
    if not known:
        raise InputError(
            f"{field} '{name}' is a {config.model_type} model, which does not take images. Choose an image-text model "
            "(`trl-llava families`), or put one together with trl_llava.models.assemble.assemble_llava"
        )


def load_image_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The image processor of a model, which computes with PIL on every machine.

    transformers would take torchvision where it is installed, which rounds other values: the pixels of a recipe would
    depend on the machine. What is saved names no backend, so files are the same either way.
    """
    return AutoImageProcessor.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code, backend="pil"
    )


def load_policy(model_args: LlavaModelConfig) -> PreTrainedModel:
    """The image-text model to train, without any adapter; vision tower and projector are frozen as configured.

    Args:
        model_args: `model_name_or_path`, `model_revision`, `dtype`, `attn_implementation`, quantisation,
            `trust_remote_code`, `freeze_vision_tower` and `freeze_projector` are used.

    Returns:
        The model.

    Raises:
        OSError: If there is no such model.
        ImportError: If it is to be quantised without bitsandbytes.
        ValueError: If it is not an image-text model, or its checkpoint lacks weights.
    """
    name = model_args.model_name_or_path
    config = load_config("model_name_or_path", name, model_args.model_revision, model_args.trust_remote_code)
    _check_takes_images("model_name_or_path", name, config)
    model, info = AutoModelForImageTextToText.from_pretrained(
        name, config=config, output_loading_info=True, **_loading_arguments(model_args)
    )
    _check_all_loaded(name, info)
    keep_differentiable(model)
    freeze_vision(model, tower=model_args.freeze_vision_tower, projector=model_args.freeze_projector)
    return model


def load_sequence_classifier(
    name: str,
    model_args: LlavaModelConfig,
    *,
    revision: str | None = None,
    new_head: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with a score head of one label; vision tower and projector are frozen as configured.

    Args:
        name: Hub ID or folder; a generation checkpoint of the family, or one saved with a head.
        model_args: As for `load_policy`; its `model_name_or_path` and `model_revision` are not used.
        revision: Branch, tag or commit.
        new_head: Whether a checkpoint without a head gets a new one (weight from a normal distribution of the model's
            `initializer_range`, bias 0). False is right for scoring: then it is an error.
        seed: Seed of the new head.

    Returns:
        The model.

    Raises:
        OSError: If there is no such model.
        ImportError: If it is to be quantised without bitsandbytes.
        ValueError: If the family has no score-head model, or the checkpoint lacks weights, or the head with
            `new_head=False`.
    """
    config = load_config("model_name_or_path", name, revision, model_args.trust_remote_code)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise InputError(
            f"'{name}' is a {config.model_type} model, for which there is no score head. Reward and value models can "
            f"be of these families: {', '.join(family.name for family in FAMILIES)}"
        )
    config.num_labels = 1
    with _without_report():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, output_loading_info=True, **{**_loading_arguments(model_args), "revision": revision}
        )
    head_keys = {f"{HEAD}.{key}" for key in model.score.state_dict()}
    head_missing = bool(head_keys & set(info["missing_keys"])) and not _take_value_head(model, name, revision)
    _check_all_loaded(name, {**info, "missing_keys": set(info["missing_keys"]) - head_keys})
    if head_missing and not new_head:
        raise InputError(
            f"'{name}' has no score head ({', '.join(sorted(head_keys))} not in its checkpoint, and no "
            f"{VALUE_HEAD_FILE}), so its scores would be random. Use a trained reward model, or train one with "
            "`trl-llava reward`"
        )
    keep_differentiable(model)
    if head_missing:
        _init_head(model.score, config.get_text_config().initializer_range, seed)
    if any(name.split(".")[-1] in TOWER_NAMES for name, _ in model.named_modules()):
        freeze_vision(model, tower=model_args.freeze_vision_tower, projector=model_args.freeze_projector)
    return model


def _take_value_head(model: PreTrainedModel, name: str, revision: str | None) -> bool:
    """Fill the score head from the file in which TRL saves value heads (Skywork-VL-Reward has one), if it is there."""
    file = find_file(name, VALUE_HEAD_FILE, revision)
    if file is None:
        return False
    saved = {key.rpartition(".")[2]: value for key, value in load_file(file).items() if "v_head.summary" in key}
    own = model.score.state_dict()
    saved.setdefault("bias", torch.zeros_like(own["bias"]))
    if {key: value.shape for key, value in saved.items()} != {key: value.shape for key, value in own.items()}:
        found = {key: tuple(value.shape) for key, value in saved.items()}
        expected = {f"v_head.summary.{key}": tuple(value.shape) for key, value in own.items()}
        raise InputError(
            f"{VALUE_HEAD_FILE} of '{name}' holds {found}, expected {expected}: it is another model's head"
        )
    with torch.no_grad(), whole(model.score.parameters()):
        model.score.load_state_dict(saved)
    return True


def load_config(field: str, name: str | None, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model, not of an adapter; `field` is the recipe's that names it, for the message."""
    name = check_there(field, name, revision)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        raise InputError(
            f"{field} '{name}' holds an adapter, not a model. Set {field} to its base ('{base}') and "
            f"adapter_name_or_path to '{name}'"
        )
    _refuse_pickles(field, name, revision)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise NotFoundError(not_found(field, name, revision, error)) from error


def _refuse_pickles(field: str, name: str, revision: str | None) -> None:
    """Raise for a model that has its weights as pickles only; transformers would load them."""

    def has(*files: str) -> bool:
        return any(find_file(name, file, revision) is not None for file in files)

    if has("model.safetensors", "model.safetensors.index.json"):
        return
    if has("pytorch_model.bin", "pytorch_model.bin.index.json"):
        raise InputError(
            f"{field} '{name}' has its weights as a pickle only (pytorch_model.bin), which may run code when it is "
            f"loaded. Convert it: `trl-llava convert {name} DST` for LLaVA's own layout, which reads nothing but "
            "tensors, or with `save_pretrained` in an environment that holds nothing of worth"
        )


def _loading_arguments(model_args: LlavaModelConfig) -> dict[str, Any]:
    """The keyword arguments of `from_pretrained` that the recipe decides."""
    dtype = model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    arguments = {
        "use_safetensors": True,
        "revision": model_args.model_revision,
        "dtype": dtype,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": model_args.trust_remote_code,
    }
    if model_args.load_in_4bit or model_args.load_in_8bit:
        arguments["quantization_config"] = quantization_config(model_args)
        arguments["device_map"] = {"": _this_device()}
    return arguments


def _this_device() -> torch.device | int:
    """Where this process computes, for a device map: a GPU by its number, which accelerate leaves out for one."""
    device = PartialState().device
    if device.type != "cuda":
        return device
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from warning about a missing head: what is missing is checked here, and the head is meant."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_all_loaded(name: str, info: dict[str, Any]) -> None:
    """Raise for weights that the checkpoint should have had; transformers only logs them."""
    wrong = [(kind, sorted(map(str, info[kind]))) for kind in ("missing_keys", "mismatched_keys") if info[kind]]
    if wrong:
        kind, keys = wrong[0]
        raise InputError(
            f"the checkpoint '{name}' does not fit its config.json: {len(keys)} {kind.replace('_', ' ')}, first "
            f"{keys[0]}. Such weights would be random; get the complete checkpoint"
        )


def _init_head(head: nn.Linear, std: float, seed: int) -> None:
    """Draw the weight from its own generator, on the CPU so that it is the same everywhere; bias 0."""
    with torch.no_grad(), whole(head.parameters()):
        weight = torch.empty(head.weight.shape).normal_(std=std, generator=torch.Generator().manual_seed(seed))
        head.weight.copy_(weight)
        if head.bias is not None:  # transformers' own heads, of text-only models, have none
            head.bias.zero_()
