"""Prompts with images as vLLM takes them, made from prompts whose images are expanded to image tokens already."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.image_tensors import small_enough_to_pad
from trl_llava.errors import InputError
from trl_llava.models.families import FAMILIES, Family
from trl_llava.models.vision_tower import can_pad_to_square


def require_served(family: Family | None, name: str) -> None:
    """Refuse the model `name` if its family's rollouts in vLLM have not been seen to equal the policy's own."""
    if family is not None and family.vllm:
        return
    what = "of a family that is not known here" if family is None else f"a {family.name}"
    served = ", ".join(known.name for known in FAMILIES if known.vllm)
    raise InputError(
        f"`use_vllm: true`: '{name}' is {what}, and rollouts in vLLM have been seen to be right for {served} only. "
        "Choose one of these, or leave `use_vllm` out, which generates in transformers"
    )


def place_images(token_ids: Sequence[int], image_token_id: int, lengths: Sequence[int]) -> list[dict[str, int]]:
    """Find where each image stands in a prompt.

    Args:
        token_ids: the prompt, images expanded.
        image_token_id: what stands for them.
        lengths: N of each image, as the server counts.

    Returns:
        `offset` and `length` of each image.

    Raises:
        InputError: if the prompt has another number of image tokens.

    Example:
        >>> place_images([1, 9, 9, 5, 9, 9, 9, 2], 9, [2, 3])
        [{'offset': 1, 'length': 2}, {'offset': 4, 'length': 3}]
    """
    here = [position for position, token in enumerate(token_ids) if token == image_token_id]
    places, taken = [], 0
    for length in lengths:
        run = here[taken : taken + length]
        if len(run) < length or run[-1] - run[0] != length - 1:
            break
        places.append({"offset": run[0], "length": length})
        taken += length
    if len(places) < len(lengths) or taken != len(here):
        raise InputError(
            f"the vLLM server makes {sum(lengths)} image tokens of {len(lengths)} images ({list(lengths)}), where "
            f"the policy's processor makes {len(here)}: the two process images differently. Serve the folder or "
            "Hub ID that the policy starts from, with its own processor"
        )
    return places


def one_token_each(token_ids: Sequence[int], image_token_id: int | None, images: int) -> list[int]:
    """Put one image token in the place of each image's many.

    Args:
        token_ids: the prompt, images expanded.
        image_token_id: what stands for them; `None` if the model knows none.
        images: how many there are.

    Returns:
        The prompt as vLLM expands it.

    Raises:
        InputError: if two images stand side by side, so that nothing shows where one ends.

    Example:
        >>> one_token_each([1, 9, 9, 5, 9, 9, 9, 2], 9, 2)
        [1, 9, 5, 9, 2]
    """
    short, found = [], 0
    for token, run in groupby(token_ids):
        if token == image_token_id:
            short.append(token)
            found += 1
        else:
            short.extend(run)
    if found != images:
        raise InputError(
            f"a prompt shows {images} images in {found} places: with `vllm_mode: colocate` there must be text "
            "between two images. Use `vllm_mode: server`, or a chat template that writes a line break after each"
        )
    return short


def as_seen(image: Image.Image, processor: ProcessorMixin | PreTrainedTokenizerBase) -> Image.Image:
    """An image that any processor of the same kind sees as this one does, also if it does not pad to a square.

    Args:
        image: an RGB image.
        processor: the policy's.

    Returns:
        The image, padded to a square in the mean colour where the policy's processor would pad it.
    """
    image_processor: Any = getattr(processor, "image_processor", None)
    if not (can_pad_to_square(image_processor) and image_processor.do_pad):
        return image
    image = small_enough_to_pad(image, processor)
    mean, side = image_processor.image_mean, max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(part * 255) for part in mean) if mean else 0)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
