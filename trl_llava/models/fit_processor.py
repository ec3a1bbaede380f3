"""Whether a processor fits the model it is saved with: as many image tokens as features, as many ids as embeddings.

Else the run ends in the middle of a forward pass, on a GPU with an assertion that names nothing.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, ProcessorMixin

from trl_llava.errors import InputError
from trl_llava.hub.lookup import find_file, local_base
from trl_llava.models.sharded_weights import loaded_whole

PATCHES, STRATEGY, ADDITIONAL = "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"


def fit_to_model(processor: ProcessorMixin, name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Take what a processor lacks from its model's config, and refuse one that the model cannot follow.

    An adapter's is held against its base; where that is not to be found either, there is nothing to hold it against.
    """
    model, its_revision = name, revision
    if find_file(name, "config.json", revision) is None:
        file = find_file(name, "adapter_config.json", revision)
        adapter = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        model, its_revision = local_base(name, adapter.get("base_model_name_or_path")) or "", adapter.get("revision")
        if not model or find_file(model, "config.json", its_revision) is None:
            return
    try:
        config = AutoConfig.from_pretrained(model, revision=its_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return  # the model's own loading says it
    _check_embeddings(processor, config, name)
    _check_feature_layers(config, name)
    if all(hasattr(processor, field) for field in (PATCHES, STRATEGY, ADDITIONAL)):
        _fit_image_tokens(processor, config, name, _saved_fields(name, revision))
    for field, found, right in _of_other_families(processor, config):
        if found != right:
            raise InputError(
                f"the processor of {name} makes image tokens for {field} {found}, the model features for {right}: set "
                f"{field} to {right} in the processor's files"
            )


def _check_embeddings(processor: ProcessorMixin, config: PreTrainedConfig, name: str) -> None:
    tokens, embeddings = max(processor.tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size
    if tokens > embeddings:
        raise InputError(
            f"the tokenizer of {name} has {tokens} tokens, the model {embeddings} embeddings: resize them "
            "(model.resize_token_embeddings) and save, or remove the added tokens"
        )


def _check_feature_layers(config: PreTrainedConfig, name: str) -> None:
    given, layers = (
        getattr(config, "vision_feature_layer", None),
        getattr(getattr(config, "vision_config", None), "num_hidden_layers", None),
    )
    for layer in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(layer, int) and isinstance(layers, int) and not -layers - 1 <= layer <= layers:
            raise InputError(
                f"`vision_feature_layer` in config.json of {name} is {given}, but its tower has {layers} layers: "
                f"expected {-layers - 1} to {layers}"
            )


def _fit_image_tokens(processor: ProcessorMixin, config: PreTrainedConfig, name: str, saved: dict[str, Any]) -> None:
    vision, strategy = config.vision_config, getattr(config, STRATEGY, None)
    if strategy not in ("default", "full") or not isinstance(getattr(vision, PATCHES, None), int):
        return
    right = {PATCHES: vision.patch_size, STRATEGY: strategy, ADDITIONAL: _class_tokens(vision)}
    for field, value in right.items():
        if getattr(processor, field) is None or saved.get(field) is None:
            setattr(processor, field, value)
    side = vision.image_size
    made, features = (
        (side // given[PATCHES]) ** 2 + given[ADDITIONAL] - (given[STRATEGY] == "default")
        for given in ({field: getattr(processor, field) for field in right}, right)
    )
    if made != features:
        values = ", ".join(f"{field} to {value!r}" for field, value in right.items())
        raise InputError(
            f"the processor of {name} makes {made} image tokens of {side}x{side} pixels, the model {features} "
            f"features: set {values} in processor_config.json"
        )


def _of_other_families(processor: ProcessorMixin, config: PreTrainedConfig) -> list[tuple[str, int, int]]:
    """Fields of processors that decide the number of image tokens, with their values and those the model needs."""
    vision: Any = getattr(config, "vision_config", None)
    images = processor.image_processor
    if hasattr(images, "merge_size"):  # Qwen's: an image becomes patches of its own size
        merge = getattr(vision, "spatial_merge_size", images.merge_size)
        return [("patch_size", images.patch_size, vision.patch_size), ("merge_size", images.merge_size, merge)]
    if getattr(vision, "model_type", None) == "pixtral":
        merge = getattr(config, "spatial_merge_size", 1)
        own = processor.spatial_merge_size
        return [(PATCHES, processor.patch_size, vision.patch_size), ("spatial_merge_size", own, merge)]
    if config.model_type == "gemma3":
        return [("image_seq_length", processor.image_seq_length, config.mm_tokens_per_image)]
    if not all(isinstance(getattr(vision, name, None), (int, list, tuple)) for name in ("image_size", PATCHES)):
        return []
    sides = [getattr(vision, name) for name in ("image_size", PATCHES)]
    size, patch = (side if isinstance(side, int) else side[0] for side in sides)
    patches = (size // patch) ** 2
    if config.model_type == "internvl":
        return [("image_seq_length", processor.image_seq_length, int(patches * config.downsample_ratio**2))]
    if config.model_type in ("idefics3", "smolvlm"):
        return [("image_seq_len", processor.image_seq_len, patches // config.scale_factor**2)]
    if config.model_type == "paligemma":
        return [("image_seq_length", processor.image_seq_length, patches)]
    return []


def _class_tokens(vision: PreTrainedConfig) -> int:
    """How many features a vision tower makes beside those of patches: CLIP one of the whole image, SigLIP none."""
    with loaded_whole(), torch.device("meta"):  # no memory; under ZeRO-3 it would be shared out
        tower = AutoModel.from_config(vision)
    return sum(key.rpartition(".")[2] in ("class_embedding", "cls_token") for key, _ in tower.named_parameters())


def _saved_fields(name: str, revision: str | None) -> dict[str, Any]:
    """The values in a processor's file: transformers has defaults for those that it lacks."""
    file = find_file(name, "processor_config.json", revision)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
