"""Rows as TRL's own trainers read them: pictures decoded, image parts without a text of their own."""

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from trl_llava.data.contract import RowError
from trl_llava.data.images import load_image
from trl_llava.prompts import Message


def as_trl_reads(rows: Dataset) -> Dataset:
    """Make normalised rows fit `GRPOTrainer` and `RLOOTrainer`, which hand `images` to the processor as they are.

    Nothing is computed before a row is read.

    Args:
        rows: Rows of the prompt stage.

    Returns:
        The same rows; reading one gives `images` as RGB pictures, and each message's parts without empty fields.

    Raises:
        RowError: If some rows have images and some have none, which those trainers cannot encode in one batch.

    Example:
        >>> part = {"type": "image", "text": None}
        >>> row = {"row_name": "a[0]", "images": [], "prompt": [{"role": "user", "content": [part]}]}
        >>> as_trl_reads(Dataset.from_list([row]))[0]["prompt"]
        [{'role': 'user', 'content': [{'type': 'image'}]}]
    """
    _check_alike(rows)
    return rows.with_transform(_convert)


def _check_alike(rows: Dataset) -> None:
    has_images: bool | None = None
    start = 0
    for table in rows.select_columns("images").with_format("arrow").iter(batch_size=1000):
        for i, count in enumerate(pc.list_value_length(table["images"]).to_pylist()):
            if has_images is not None and has_images != bool(count):
                raise RowError(
                    rows[start + i]["row_name"],
                    f"it has {'an image' if count else 'no image'}, unlike the rows before it, and TRL's trainer "
                    "cannot encode both in one batch",
                    "Keep rows with images or rows without, or use `trl-llava ppo`, which takes both",
                    "rows with and without images",
                )
            has_images = bool(count)
        start += len(table)


def _convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    converted = dict(batch)
    if "images" in batch:
        names = batch.get("row_name") or [f"row {i}" for i in range(len(batch["images"]))]
        converted["images"] = [
            [load_image(ref, name) for ref in refs] for refs, name in zip(batch["images"], names, strict=True)
        ]
    if "prompt" in batch:
        converted["prompt"] = [[_without_empty(message) for message in prompt] for prompt in batch["prompt"]]
    return converted


def _without_empty(message: Message) -> Message:
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {"role": message["role"], "content": parts}
