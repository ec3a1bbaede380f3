"""Rows with one prompt, found among those that TRL hands to a reward function."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from trl_llava.data.images import ImageRef, load_image
from trl_llava.prompts import Message

Conversation = str | list[Message]
"""A prompt or a completion as TRL hands it over: text, or messages whose content is text or a list of parts."""


def same_prompts(rows: Sequence[tuple]) -> list[int]:
    """For each of B rows the first one with the same prompt and images.

    A row begins with prompt, completion and images; these are None where they are in the prompt.
    """
    first: dict[tuple[str, ...], int] = {}
    keys: dict[int, str] = {}  # completions of one prompt mostly come with the very same image objects
    groups = []
    for row, (prompt, _, images, *_) in enumerate(rows):
        messages, own = split_images(prompt, images, "user")
        for image in own:
            if id(image) not in keys:
                keys[id(image)] = _image_key(image)
        groups.append(first.setdefault((repr(messages), *(keys[id(image)] for image in own)), row))
    return groups


def split_images(
    conversation: Conversation, images: list[ImageRef] | tuple[ImageRef, ...] | ImageRef | None, role: str
) -> tuple[list[Message], list[ImageRef]]:
    """Messages whose image parts are empty, and the images: those given, else those that were in the parts.

    TRL's trainers put images into a prompt's parts. A conversation that is a text becomes one message of `role`.
    """
    if isinstance(conversation, str):
        conversation = [{"role": role, "content": conversation}]
    inside: list[ImageRef] = []
    messages = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, list):
            inside += [
                part["image"] for part in content if part.get("type") == "image" and part.get("image") is not None
            ]
            content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
        messages.append({**message, "content": content})
    if images is None:
        return messages, inside
    return messages, list(images) if isinstance(images, (list, tuple)) else [images]


def _image_key(image: ImageRef) -> str:
    """Equal for images with the same pixels."""
    if isinstance(image, (torch.Tensor, np.ndarray)):  # whose `repr` leaves most of them out
        image = load_image(image, "the image")
    if not isinstance(image, Image.Image):
        return repr(image)
    pixels = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    return repr((image.mode, image.size, image.getpalette(), image.info, pixels))
