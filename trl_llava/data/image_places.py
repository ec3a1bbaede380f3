"""Where images stand in a turn, and whether the chat template leaves them there."""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from jinja2.exceptions import TemplateError

from trl_llava.prompts import Message, render

MOVED = "in some rows an image stands after text; the chat template shows it at the front of its turn"

logger = logging.getLogger(__name__)


def moves_images(processor: Any) -> bool:
    """Whether the chat template shows the images of a turn before its text, as vicuna_v1 does, wherever they stand."""
    before, image, after = {"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}
    orders = ([before, image, after], [image, before, after])
    try:
        first, second = (render(processor, [{"role": "user", "content": order}]) for order in orders)
    except (TemplateError, ValueError):  # said with its cause when the rows are rendered
        return False
    return first == second


def text_before_image(messages: Sequence[Message]) -> bool:
    """Whether an image of a conversation stands after text of its turn."""
    kinds = [[part["type"] for part in message["content"]] for message in messages]
    return any("text" in turn and "image" in turn[turn.index("text") :] for turn in kinds)


def say_if_moved(dataset: Dataset, processor: Any) -> None:
    """Warn, once in a run, if the chat template moves images of these rows."""
    if moves_images(processor) and any(text_before_image(prompt) for prompt in _prompts(dataset)):
        _warn_once(MOVED)


def _prompts(dataset: Dataset) -> Iterable[Sequence[Message]]:
    for table in dataset.select_columns("prompt").with_format("arrow").iter(batch_size=1000):
        yield from table["prompt"].to_pylist()


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s.", text.capitalize())
