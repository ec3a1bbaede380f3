"""Vision tower and projector of an image-text model: find them, freeze them, pad images to squares."""

import inspect
from collections.abc import Collection
from typing import Any, Literal

from torch import nn
from transformers import LlavaImageProcessorPil, ProcessorMixin

from trl_llava.errors import InputError
from trl_llava.models.families import PROJECTOR_NAMES, TOWER_NAMES


def lies_in(name: str, parts: Collection[str]) -> bool:
    """Whether a dotted name of a module or parameter lies in one of these parts."""
    return not set(parts).isdisjoint(name.split("."))


def is_vision(name: str) -> bool:
    """Whether a dotted name of a module or parameter lies in the vision tower or the projector."""
    return lies_in(name, TOWER_NAMES + PROJECTOR_NAMES)


def trains_vision(model: nn.Module) -> bool:
    """Whether gradients reach the vision tower or the projector of an image-text model."""
    return any(parameter.requires_grad and is_vision(name) for name, parameter in model.named_parameters())


def takes_image_features(backbone: nn.Module) -> bool:
    """Whether the forward pass of a headless image-text model takes image features in place of pixels."""
    return "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters


def freeze_vision(model: nn.Module, *, tower: bool = True, projector: bool = True) -> None:
    """Stop the gradients of the tower and, where there is one, of the projector, found by module name.

    LLaVA-NeXT's `image_newline` belongs to the projector, and so does what joins patches at the end of Qwen's tower. A
    tower that is not found is an error: a silent miss would train it.
    """
    found = [(part_of(name), parameter) for name, parameter in model.named_parameters()]
    if tower and not any(part == "tower" for part, _ in found):
        raise InputError(
            f"{type(model).__name__} has no vision tower to freeze: expected a module named one of "
            f"{', '.join(TOWER_NAMES)}. Set freeze_vision_tower to false to train without freezing"
        )
    if not projector and not any(part == "projector" for part, _ in found):
        raise InputError(
            f"{type(model).__name__} has no projector to train: expected a module named one of "
            f"{', '.join(PROJECTOR_NAMES)}. Leave freeze_projector true"
        )
    for part, parameter in found:
        if (part == "tower" and tower) or (part == "projector" and projector):
            parameter.requires_grad_(False)


def part_of(name: str) -> Literal["tower", "projector", "language model"]:
    """The part of an image-text model that a dotted name of a module or parameter lies in."""
    if lies_in(name, PROJECTOR_NAMES):
        return "projector"
    return "tower" if lies_in(name, TOWER_NAMES) else "language model"


def set_square_padding(processor: ProcessorMixin, enabled: bool) -> None:
    """Pad each image to a square before it is resized, or stop doing so; in place, and saved with the processor.

    As in the paper, the border has the colour of the image mean, so it is 0 after normalisation. A CLIP image
    processor, which crops what does not fit, is replaced by LLaVA's with the same sizes and statistics.
    """
    image_processor = processor.image_processor
    if can_pad_to_square(image_processor):
        image_processor.do_pad = enabled
    elif enabled and "CLIPImageProcessor" in type(image_processor).__name__:
        settings = image_processor.to_dict()
        settings.pop("image_processor_type", None)
        processor.image_processor = LlavaImageProcessorPil(**{**settings, "do_pad": True})
    elif enabled:
        raise InputError(
            f"{type(image_processor).__name__} cannot pad to a square; expected a CLIP or LLaVA image processor. "
            "Set pad_to_square to false, or leave it out to keep the processor as it is."
        )


def can_pad_to_square(image_processor: Any) -> bool:
    """Whether `do_pad` of an image processor is about squares: only LLaVA-1.5's is.

    LLaVA-OneVision has a `pad_to_square` too, but pads rows of several images by its own rule; `do_pad` says there,
    as in LLaVA-NeXT, that images of a batch get as many tiles each.
    """
    return hasattr(image_processor, "pad_to_square") and not hasattr(image_processor, "image_grid_pinpoints")
