"""Prompt rows as TRL's GRPO and RLOO trainers read them: images decoded, image parts without a text of their own."""

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from trl_llava.data.contract import RowError, check_one_image, names_or_numbers
from trl_llava.data.images import load_image
from trl_llava.data.thumbnails import image_name
from trl_llava.prompts import Message


def as_trl_reads(rows: Dataset, *, one_image: bool = False) -> Dataset:
    """Make normalised rows fit `GRPOTrainer` and `RLOOTrainer`, which hand `images` to the processor as they are.

    Nothing is decoded before a row is read; `image_names` keeps the names of the files. Rows with and without images
    in one data set, which those trainers cannot encode in one batch, are a `RowError`; with `one_image` so is a row
    that has several.

    Args:
        rows: What `load_rows(..., "prompt")` gives.
        one_image: Refuse rows with several images.

    Returns:
        The rows with `prompt` as messages and `images` decoded, each when it is read.

    Raises:
        RowError: If the rows do not go together.

    Example:
        >>> from datasets import Dataset
        >>> part = {"type": "image", "text": None}
        >>> row = {"row_name": "a[0]", "images": [], "prompt": [{"role": "user", "content": [part]}]}
        >>> as_trl_reads(Dataset.from_list([row]))[0]["prompt"]
        [{'role': 'user', 'content': [{'type': 'image'}]}]
    """
    has_images: bool | None = None
    start = 0
    for table in rows.select_columns("images").with_format("arrow").iter(batch_size=1000):
        for i, count in enumerate(pc.list_value_length(table["images"]).to_pylist(), start):
            if one_image and count > 1:
                check_one_image(rows[i]["images"], rows[i]["row_name"], "TRL's trainer")
            if has_images is not None and has_images != bool(count):
                found = f"it has {'an image' if count else 'no image'}, unlike the rows before it"
                raise RowError(
                    rows[i]["row_name"],
                    f"{found}, and TRL's trainer cannot encode both in one batch",
                    "Keep rows with images or rows without, or use `trl-llava ppo`, which takes both",
                )
            has_images = bool(count)
        start += len(table)
    return rows.with_transform(_convert)


def _convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    converted = dict(batch)
    if "images" in batch:
        names = names_or_numbers(batch.get("row_name"), len(batch["images"]))
        converted["images"] = [
            [load_image(ref, name) for ref in refs] for refs, name in zip(batch["images"], names, strict=True)
        ]
        converted.setdefault("image_names", [[image_name(ref) for ref in refs] for refs in batch["images"]])
    if "prompt" in batch:
        converted["prompt"] = [[_without_empty(message) for message in prompt] for prompt in batch["prompt"]]
    return converted


def _without_empty(message: Message) -> Message:
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {"role": message["role"], "content": parts}
