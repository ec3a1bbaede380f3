"""What a processor makes of the images of a batch: a text for each image token, and tensors cut into rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data import images as limits
from trl_llava.errors import InputError
from trl_llava.models.vision_tower import can_pad_to_square


@dataclass(frozen=True)
class ImageTensors:
    """What a processor makes of the images of a batch; empty where no row has any."""

    replacements: list[list[str]]  # for each row and image, the text that its image token stands for
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # by name (`pixel_values`, ...), for all rows
    counts: dict[str, list[int]] = field(default_factory=dict)  # by name, how many entries of a tensor each row has


def expand_images(
    processor: ProcessorMixin | PreTrainedTokenizerBase, images: Sequence[Sequence[Image.Image]]
) -> ImageTensors:
    """Prepare the images of a batch, and find what each image token stands for in the text."""
    with_images = [[small_enough_to_pad(image, processor) for image in row] for row in images if row]
    if not with_images:
        return ImageTensors([[] for _ in images])
    kind = type(processor).__name__
    token = getattr(processor, "image_token", None)
    if token is None or getattr(processor, "image_processor", None) is None:
        missing = "image_token" if token is None else "image_processor"
        raise InputError(
            f"{kind} has no `{missing}`, so rows with images cannot be encoded. Use an image-text-to-text model's "
            "processor, or rows without images."
        )
    outputs = processor(
        text=[token * len(row) for row in with_images],
        images=with_images,
        padding=processor.tokenizer.pad_token_id is not None,  # some processors make an array of the ids
        return_text_replacement_offsets=True,
        images_kwargs={"return_tensors": "pt"},
    )
    offsets = outputs.pop("text_replacement_offsets", None)
    if offsets is None or [len(row) for row in offsets] != [len(row) for row in with_images]:
        raise InputError(
            f"{kind} does not tell which text replaces an image token: its `replace_image_token` is missing or unused."
        )
    tensors = {name: torch.as_tensor(outputs[name]) for name in outputs if name in image_input_names(processor)}
    remaining = iter(offsets)
    replacements = [[part["replacement"] for part in next(remaining)] if row else [] for row in images]
    counts = {
        name: entries_of_rows(name, tensor, [len(row) for row in images], replacements, token)
        for name, tensor in tensors.items()
    }
    return ImageTensors(replacements, tensors, counts)


def small_enough_to_pad(image: Image.Image, processor: Any) -> Image.Image:
    """The image, made smaller where the square that the processor pads it to would have more pixels than are allowed.

    Of a strip of 18000x100 pixels that square takes 4 GB, and the model sees some hundred pixels a side of it.
    """
    image_processor: Any = getattr(processor, "image_processor", None)
    longest = math.isqrt(limits.MAX_PIXELS)
    if max(image.size) <= longest or not can_pad_to_square(image_processor) or not image_processor.do_pad:
        return image
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height))


def entries_of_rows(
    name: str, tensor: torch.Tensor, images: Sequence[int], replacements: Sequence[Sequence[str]], token: str
) -> list[int]:
    """How many entries of an image tensor each row has, of B rows with so many `images` and so many image `token`s.

    Processors make one for each image, one for each row that has images, or as many as an image has tiles or patches,
    each of which becomes the same number of image tokens.
    """
    entries = len(tensor)
    if entries == sum(images):
        return list(images)
    if entries == sum(count > 0 for count in images):
        return [int(count > 0) for count in images]
    tokens = [sum(text.count(token) for text in row) for row in replacements]
    found = [entries * own // sum(tokens) for own in tokens]
    if [own * sum(tokens) for own in found] != [entries * own for own in tokens]:
        raise InputError(
            f"`{name}` of shape {tuple(tensor.shape)} cannot be split into rows: expected one entry for each of "
            f"{sum(images)} images, or entries that each become the same number of the {sum(tokens)} image tokens"
        )
    return found


def image_input_names(processor: ProcessorMixin) -> set[str]:
    """Names of the tensors that a processor makes of images and that its model reads."""
    return {*processor.image_processor.model_input_names} - {*getattr(processor, "unused_input_names", ())}
