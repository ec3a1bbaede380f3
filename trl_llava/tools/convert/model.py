"""LLaVA's own model checkpoints to `LlavaForConditionalGeneration`, tensor by tensor.

Nothing is loaded as a model: names are translated, and compared with those of an empty model before the folder is
kept. A linear projector becomes the first of LLaVA's two projector layers, with the identity as the second and no
activation between them, so it is exact.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from trl_llava.errors import InputError
from trl_llava.models.load import load_image_processor
from trl_llava.models.vision_tower import set_square_padding
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE
from trl_llava.tools.convert.layouts import model_shards, read_shard
from trl_llava.tools.convert.paper_tokenizer import (
    is_legacy,
    load_paper_tokenizer,
    load_sentencepiece,
    reads_later_turns_as_unknown,
)

Tensors = Iterator[tuple[str, torch.Tensor]]

SHARD_BYTES = 2 * 10**9
"""Size of a file; the peak of memory, as what is read is mapped."""

_LANGUAGE = (
    "hidden_act hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps rope_scaling rope_theta vocab_size head_dim"
)
_TOWER = (
    "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads num_channels image_size "
    "patch_size hidden_act layer_norm_eps attention_dropout initializer_range initializer_factor"
)

# From the names of a model in memory to those that checkpoints on the Hub have.
_HUB_PREFIXES = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_OLD_TOWER = "model.vision_tower.vision_tower.vision_model."
_OLD_PROJECTOR = "model.mm_projector."
# Buffers that older transformers saved; today's computes them.
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


class VisionSource(NamedTuple):
    """The CLIP model that a checkpoint sees with."""

    name: str  # Hub ID or folder
    title: str  # what the checkpoint's config.json calls it
    config: CLIPVisionConfig


def convert_model(folder: Path, output: Path, *, vision_tower: str | None = None) -> list[str]:
    """Write model, processor and configuration; returns notes on where things came from.

    `vision_tower` is the CLIP model, where it is not at the place that config.json names.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_settings(folder, settings)
    vision = _vision_source(folder, settings, vision_tower)
    names = [name for shard in model_shards(folder) for name, _ in read_shard(shard)]
    linear = f"{_OLD_PROJECTOR}weight" in names
    processor, padded = _processor(folder, settings, vision)
    config = _config(settings, vision.config, processor, linear)

    notes = [f"The images are {padded} (image processor of {vision.title})."]
    expected = _expected_shapes(config)
    stored = any(name.startswith(_OLD_TOWER) for name in names)
    parts = [_translated(read_shard(shard), folder) for shard in model_shards(folder)]
    if linear:
        parts.append(_identity_layer(config))
        notes.append("The projector is one linear layer; it is exact (linear_2 is the identity).")
    if stored:
        notes.append("The vision weights are those stored in the checkpoint.")
    else:
        parts.append(_clip_weights(vision, expected))
        notes.append(f"The checkpoint stores no vision weights; they are those of {vision.title}.")
    if reads_later_turns_as_unknown(load_sentencepiece(folder / "tokenizer.model"), is_legacy(folder)):
        notes.append("Its tokenizer gave <unk> for the USER of later turns; this one spells it.")
    save_torch_state_dict(_checked(parts, expected, folder), output, max_shard_size=SHARD_BYTES)
    config.save_pretrained(output)
    GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=[config.image_token_id],  # an image token in a completion would ask for an image
    ).save_pretrained(output)
    processor.save_pretrained(output)
    return notes


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise for LLaVA models that compute something else than `LlavaForConditionalGeneration` does."""
    known: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": (None, "linear", "mlp2x_gelu"),
        "mm_use_im_start_end": (None, False),
        "mm_vision_select_feature": (None, "patch", "cls_patch"),
        "image_aspect_ratio": (None, "pad", "square"),
        "tie_word_embeddings": (None, False),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
    }
    for name, values in known.items():
        if settings.get(name) not in values:
            raise InputError(
                f"{folder / 'config.json'} has {name}={settings[name]!r}, expected one of {values}: this kind of "
                "LLaVA cannot be converted here. For LLaVA-NeXT the Hub has conversions (llava-hf)"
            )
    if "mm_vision_tower" not in settings:
        raise InputError(
            f"{folder / 'config.json'} names no mm_vision_tower; it is not a model that LLaVA's code has saved. A "
            f"model that transformers knows ({settings.get('model_type')!r}) needs no conversion"
        )


def _vision_source(folder: Path, settings: dict[str, Any], given: str | None) -> VisionSource:
    """The CLIP model: as given, or a folder of that name beside the checkpoint, or on the Hub."""
    named = settings["mm_vision_tower"]
    beside = [parent / named for parent in (Path(), folder, *folder.absolute().parents[:2])]
    found = next((str(place) for place in beside if (place / "config.json").is_file()), named)
    name = given or found
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the vision tower '{name}' that {folder / 'config.json'} names cannot be loaded: its configuration and "
            f"image processor are needed. Give its folder with --vision_tower, or fetch it (`hf download {name}`). "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig):
        raise InputError(f"the vision tower '{name}' is a {type(config).__name__}; expected CLIP")
    # What a loaded configuration remembers of its file is no part of the new model.
    config = CLIPVisionConfig(**{key: value for key, value in config.to_diff_dict().items() if key in _TOWER.split()})
    return VisionSource(name, named, config)


def _processor(folder: Path, settings: dict[str, Any], vision: VisionSource) -> tuple[LlavaProcessor, str]:
    processor = LlavaProcessor(
        image_processor=load_image_processor(vision.name),
        tokenizer=load_paper_tokenizer(folder),
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=_strategy(settings),
        chat_template=VICUNA_V1_CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLIP's class token
    )
    # LLaVA-RLHF's config.json does not say; its scripts pad in all three stages.
    pad = settings.get("image_aspect_ratio") != "square"
    if pad:
        set_square_padding(processor, True)
    return processor, "padded to a square" if pad else "cropped to a square"


def _strategy(settings: dict[str, Any]) -> str:
    return "full" if settings.get("mm_vision_select_feature") == "cls_patch" else "default"


def _config(
    settings: dict[str, Any], vision: CLIPVisionConfig, processor: LlavaProcessor, linear: bool
) -> LlavaConfig:
    tokenizer = processor.tokenizer
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = {name: settings[name] for name in _LANGUAGE.split() if settings.get(name) is not None}
    strategy = _strategy(settings)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text, **ids, tie_word_embeddings=False),
        image_token_index=processor.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (strategy == "full"),
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.pad_token_id = tokenizer.pad_token_id
    config.dtype = settings.get("torch_dtype") or settings.get("dtype")
    return config


def _hub_name(name: str) -> str:
    prefix = next(prefix for prefix in _HUB_PREFIXES if name.startswith(prefix))
    return _HUB_PREFIXES[prefix] + name.removeprefix(prefix).removeprefix("vision_model.")


def _expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the finished checkpoint must have, from a model without memory."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {_hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _translated(tensors: Tensors, folder: Path) -> Tensors:
    """Rename what an original checkpoint holds, and leave its buffers out."""
    projector = {"": "linear_1.", "0.": "linear_1.", "2.": "linear_2."}
    for name, tensor in tensors:
        if name.endswith(_BUFFERS):
            continue
        if name.startswith(_OLD_TOWER):
            yield "vision_tower.vision_model." + name.removeprefix(_OLD_TOWER), tensor
        elif name.startswith(_OLD_PROJECTOR):
            place, _, part = name.removeprefix(_OLD_PROJECTOR).rpartition(".")
            layer = projector.get(f"{place}." if place else "")
            if layer is None:
                raise InputError(f"{folder} has the projector weight {name}: neither one linear layer nor two")
            yield f"multi_modal_projector.{layer}{part}", tensor
        elif name.startswith("lm_head."):
            yield f"language_model.{name}", tensor
        else:
            yield "language_model.model." + name.removeprefix("model."), tensor


def _identity_layer(config: LlavaConfig) -> Tensors:
    size = config.text_config.hidden_size
    dtype = getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype else torch.float32
    yield "multi_modal_projector.linear_2.weight", torch.eye(size, dtype=dtype)
    yield "multi_modal_projector.linear_2.bias", torch.zeros(size, dtype=dtype)


def _clip_weights(vision: VisionSource, expected: dict[str, tuple[int, ...]]) -> Tensors:
    tower = CLIPVisionModel.from_pretrained(vision.name, config=vision.config, dtype="auto")
    for name, tensor in tower.state_dict().items():
        name = _hub_name(f"model.vision_tower.{name}")
        if name in expected:
            yield name, tensor


def _checked(parts: list[Tensors], expected: dict[str, tuple[int, ...]], folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by name, mapped from their files; a weight that is missing, unknown or misshapen is an error."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in chain(*parts):
        if name in tensors or expected.get(name) != tuple(tensor.shape):
            found = "comes twice" if name in tensors else f"has the shape {tuple(tensor.shape)}"
            raise InputError(
                f"{folder}: the weight {name} {found}, but its config.json makes it "
                f"{expected.get(name, 'no part of the model')}"
            )
        tensors[name] = tensor
    missing = expected.keys() - tensors
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights of its model, first {min(missing)}")
    return tensors
