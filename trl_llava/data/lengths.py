"""Rows that are too long, found before training starts: no row is ever cut."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.contract import RowError
from trl_llava.data.encoding import encode_text, expand_images
from trl_llava.data.images import image_size
from trl_llava.errors import InputError
from trl_llava.prompts import Message

logger = logging.getLogger(__name__)


class MeasurableCollator(Protocol):
    """What the collators of this package tell about the rows they take."""

    limit: ClassVar[str]
    """Name of the attribute with the longest length allowed, `None` for any; it is also the name of the option."""
    processor: ProcessorMixin | PreTrainedTokenizerBase

    def conversations(self, row: dict[str, Any]) -> list[list[Message]]:
        """Return the conversations that a row contributes to a batch."""

    def rendering(self) -> dict[str, Any]:
        """Return the flags they are encoded with."""


def check_lengths(ids: Sequence[Sequence[int]], row_names: Sequence[str], collator: MeasurableCollator) -> None:
    """Refuse a batch with a row that is too long.

    Args:
        ids: One list of ids per conversation.
        row_names: One name per conversation.
        collator: The collator that makes the batch.

    Raises:
        RowError: If a conversation is longer than the collator's limit.
    """
    option = collator.limit
    limit = getattr(collator, option)
    for row, name in zip(ids, row_names, strict=True):
        if limit is not None and len(row) > limit:
            raise RowError(
                name,
                f"it has {len(row)} tokens, {option} allows {limit}",
                f"Raise {option}, shorten the row, or set overlong to `drop`; rows are never cut",
                "too long",
            )


def token_lengths(rows: Sequence[dict[str, Any]], collator: MeasurableCollator) -> list[int]:
    """Count the tokens of rows, image tokens included, as the collator would; images are not decoded.

    Args:
        rows: Rows of the collator's stage.
        collator: A collator of `collators.py`.

    Returns:
        For each row the length of its longest conversation.

    Raises:
        RowError: If a row cannot be encoded, or the header of an image cannot be read.
    """
    return [length for length, _ in LengthMeter(collator).measure(rows)]


def drop_overlong(
    dataset: Dataset,
    collator: MeasurableCollator | Any,
    overlong: Literal["error", "drop"],
    *,
    num_proc: int | None = None,
) -> Dataset:
    """Refuse or leave out rows that are longer than the collator allows.

    Args:
        dataset: Normalised rows.
        collator: The collator that will make the batches; one of another kind checks its own limits, and the data set
            is returned as it is.
        overlong: `error` stops at the first such row, `drop` leaves such rows out and logs how many.
        num_proc: Processes to measure with.

    Returns:
        The rows that fit, in their order.

    Raises:
        RowError: If a row is too long and `overlong` is `error`, or if no row is left.
        ValueError: If `overlong` is neither.
    """
    if overlong not in ("error", "drop"):
        raise InputError(f"overlong is {overlong!r}, expected `error` or `drop`.")
    option = getattr(collator, "limit", "")
    limit = getattr(collator, option, None) if option else None
    if limit is None or not len(dataset):
        return dataset
    lengths = dataset.map(
        LengthMeter(collator),
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
        fix = f"Raise {option}" + (" or set overlong to `drop` to leave such rows out" if kept else "")
        raise RowError(
            dataset[first]["row_name"],
            f"it has {lengths[first]} tokens, {option} allows {limit} ({dropped} of {len(dataset)} rows are too long)",
            f"{fix}; rows are never cut",
        )
    logger.warning("Dropped %d of %d rows: longer than %s=%d tokens.", dropped, len(dataset), option, limit)
    return dataset.select(kept)


class LengthMeter:
    """Measures batches, and remembers what images of each size stand for: asking the processor is the slow part.

    Args:
        collator: A collator of `collators.py`.
    """

    def __init__(self, collator: MeasurableCollator) -> None:
        self.collator = collator
        self.replacements: dict[tuple[tuple[int, int], ...], list[str]] = {}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[int]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {"length": [length for length, _ in self.measure(rows)]}

    def measure(self, rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
        """Count the tokens of rows.

        Args:
            rows: Rows of the collator's stage.

        Returns:
            For each row the length of its longest conversation with and without image tokens.

        Raises:
            RowError: As `token_lengths`.
            ValueError: If the chat template does not fit.
        """
        conversations, replacements, names, owners = [], [], [], []
        for i, row in enumerate(rows):
            expansions = self.expansions(row)
            for conversation in self.collator.conversations(row):
                conversations.append(conversation)
                replacements.append(expansions)
                names.append(row["row_name"])
                owners.append(i)
        ids, _, pictured = encode_text(
            self.collator.processor, conversations, replacements, names, **self.collator.rendering()
        )
        lengths = [(0, 0)] * len(rows)
        for i, row_ids, image_tokens in zip(owners, ids, pictured, strict=True):
            lengths[i] = max(lengths[i], (len(row_ids), len(row_ids) - sum(image_tokens)))
        return lengths

    def expansions(self, row: dict[str, Any]) -> list[str]:
        """Ask what a row's images stand for in its text.

        Args:
            row: A row; its images are not decoded.

        Returns:
            For each image the text that replaces its image token.

        Raises:
            RowError: If the header of an image cannot be read.
        """
        sizes = tuple(image_size(ref, row["row_name"]) for ref in row.get("images") or [])
        if sizes not in self.replacements:
            blank = [[Image.new("RGB", size) for size in sizes]]
            self.replacements[sizes] = expand_images(self.collator.processor, blank)[0][0]
        return self.replacements[sizes]
