"""Rows that are too long, found before training starts: no row is ever cut."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset
from PIL import Image

from trl_llava.data.batching import Row, RowCollator
from trl_llava.data.contract import RowError
from trl_llava.data.encoding import encode_text
from trl_llava.data.image_places import say_if_moved
from trl_llava.data.image_tensors import expand_images
from trl_llava.data.images import image_size
from trl_llava.errors import InputError

logger = logging.getLogger(__name__)


def drop_overlong(
    dataset: Dataset,
    collator: RowCollator | Any,
    overlong: Literal["error", "drop"],
    *,
    positions: int | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Refuse (`error`) or leave out (`drop`), with a word in the log, rows that are longer than the collator allows.

    So are rows longer than `positions`, those that the model has for them. A collator of another kind checks its own
    limits, and the data set is returned as it is.
    """
    if overlong not in ("error", "drop"):
        raise InputError(f"overlong is {overlong!r}, expected `error` or `drop`.")
    option = getattr(collator, "limit", "")
    if option:
        say_if_moved(dataset, collator.processor)
    limit, allowed = length_limit(collator, positions)
    if limit is None or not len(dataset):
        return dataset
    lengths = dataset.map(
        LengthMeter(collator).batch,
        batched=True,
        batch_size=256,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="Counting tokens",
    )["length"]
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    dropped = len(dataset) - len(kept)
    if not dropped:
        return dataset
    if overlong == "error" or not kept:
        first = next(i for i, length in enumerate(lengths) if length > limit)
        fix = "Leave the row out" if limit == positions else f"Raise {option}"
        fix += " or set overlong to `drop` to leave such rows out" if kept else ""
        raise RowError(
            dataset[first]["row_name"],
            f"it has {lengths[first]} tokens, {allowed} ({dropped} of {len(dataset)} rows are too long)",
            f"{fix}; rows are never cut",
        )
    logger.warning("Dropped %d of %d rows, which are too long: %s tokens.", dropped, len(dataset), allowed)
    return dataset.select(kept)


def length_limit(collator: RowCollator | Any, positions: int | None) -> tuple[int | None, str]:
    """Most tokens of a row, by the collator's own limit or the model's positions, and what says so."""
    option = getattr(collator, "limit", "")
    limit = getattr(collator, option, None) if option else None
    if option and positions is not None and (limit is None or positions < limit):
        return positions, f"the model has positions for {positions}"
    return limit, f"{option} allows {limit}"


class LengthMeter:
    """Counts tokens as a collator would; what images of each size expand to is kept, as the processor is slow."""

    def __init__(self, collator: RowCollator) -> None:
        self.collator = collator
        self._expansions: dict[tuple[tuple[int, int], ...], list[str]] = {}

    def batch(self, batch: dict[str, list[Any]]) -> dict[str, list[int]]:
        """The length of each row of a batch of columns, for `Dataset.map`."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {"length": [length for length, _ in self.measure(rows)]}

    def measure(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """For each row the tokens of its longest conversation, with and without image tokens; no image is decoded."""
        conversations, replacements, names, owners = [], [], [], []
        for i, row in enumerate(rows):
            expansions = self.expansions(row)
            for conversation in self.collator.conversations(row):
                conversations.append(conversation)
                replacements.append(expansions)
                names.append(row["row_name"])
                owners.append(i)
        text = encode_text(self.collator.processor, conversations, replacements, names, **self.collator.rendering())
        lengths = [(0, 0)] * len(rows)
        for i, row_ids, image_mask in zip(owners, text.input_ids, text.image_mask, strict=True):
            lengths[i] = max(lengths[i], (len(row_ids), len(row_ids) - sum(image_mask)))
        return lengths

    def expansions(self, row: Row) -> list[str]:
        """For each image of a row the text that replaces its image token."""
        sizes = tuple(image_size(ref, row["row_name"]) for ref in row.get("images") or [])
        if sizes not in self._expansions:
            blank = [[Image.new("RGB", size) for size in sizes]]
            self._expansions[sizes] = expand_images(self.collator.processor, blank).replacements[0]
        return self._expansions[sizes]
