"""What kind each token is, text or image, for the families that read it (`token_type_ids`, `mm_token_type_ids`)."""

import functools
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.image_tensors import image_input_names
from trl_llava.errors import InputError
from trl_llava.models.families import family_of_processor


@functools.lru_cache(maxsize=16)
def kinds_name(processor: ProcessorMixin | PreTrainedTokenizerBase) -> str | None:
    """What a processor calls the tensor that says what kind each token is; None if it makes none.

    Anything else that it makes for its tokens is an error: rows would go to the model without it.
    """
    if getattr(processor, "image_processor", None) is None:
        return None
    text, blank = [processor.image_token], [[Image.new("RGB", (32, 32))]]
    made = processor(text=text, images=blank, images_kwargs={"return_tensors": "pt"})
    # PaliGemma's labels are of a completion that is given apart, which is not how rows are encoded here.
    known = {"input_ids", "attention_mask", "labels", *image_input_names(processor)}
    unknown = sorted(set(made) - known)
    if not unknown:
        return None
    kinds = unknown[0]
    family = family_of_processor(processor)
    own = family is not None and family.attends_to_whole_prompt
    if len(unknown) > 1 or not (own or kinds_of(processor, made["input_ids"]) == _lists(made[kinds])):
        raise InputError(
            f"{type(processor).__name__} makes {', '.join(unknown)} beside its image inputs "
            f"{sorted(image_input_names(processor))}: inputs per token that this package cannot build for its own "
            "batches"
        )
    return kinds


def kinds_of(processor: ProcessorMixin, ids: Any) -> list[list[int]]:
    """For each token 1 if it is of an image, else 0, by the processor's own rule."""
    return _lists(processor.create_mm_token_type_ids(_lists(ids)))


def _lists(rows: Any) -> list[list[int]]:
    return [[int(entry) for entry in row] for row in rows]
