"""What all collators share: a batch encoded under a length limit, and lists of different length padded to tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.contract import RowError
from trl_llava.data.encoding import Encoding, encode
from trl_llava.errors import InputError
from trl_llava.prompts import Message

Row = dict[str, Any]
Side = Literal["left", "right"]


class RowCollator(Protocol):
    """What the collators of this package tell about the rows they take."""

    limit: ClassVar[str]
    """Name of the attribute with the longest length allowed, `None` for any; it is also the name of the option."""
    processor: ProcessorMixin | PreTrainedTokenizerBase

    def conversations(self, row: Row) -> list[list[Message]]:
        """The conversations that a row contributes to a batch; each shows all of the row's images."""

    def rendering(self) -> dict[str, Any]:
        """The flags of `encode` for them."""


def encode_rows(collator: RowCollator, rows: Sequence[Row], images: Sequence[Sequence[Image.Image]]) -> Encoding:
    """Encode the conversations of B rows, all first ones, then all second ones; one that is too long is an error."""
    names = [row["row_name"] for row in rows]
    columns = list(zip(*map(collator.conversations, rows), strict=True))
    conversations = [conversation for column in columns for conversation in column]
    encoding = encode(
        collator.processor,
        conversations,
        images,
        row_names=names,
        image_copies=len(columns),
        **collator.rendering(),
    )
    option = collator.limit
    limit = getattr(collator, option)
    for ids, name in zip(encoding.input_ids, names * len(columns), strict=True):
        if limit is not None and len(ids) > limit:
            raise RowError(
                name,
                f"it has {len(ids)} tokens, {option} allows {limit}",
                f"Raise {option}, shorten the row, or set overlong to `drop`; rows are never cut",
                "too long",
            )
    return encoding


def text_tensors(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    *,
    side: Side = "right",
    multiple: int | None = None,
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (1 on real tokens), both (B, L) int64, of B lists of ids.

    Padding goes to `side`, whatever the tokenizer's `padding_side` is; L is rounded up to a multiple of `multiple`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no pad token. Set one (`tokenizer.pad_token = ...`) that is not the stop "
            "token."
        )
    return {
        "input_ids": pad(ids, tokenizer.pad_token_id, side=side, multiple=multiple),
        "attention_mask": pad([[1] * len(row) for row in ids], 0, side=side, multiple=multiple),
    }


def kind_tensors(
    kinds: Mapping[str, Sequence[Sequence[int]]], *, side: Side = "right", multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """The kinds of tokens, by name, padded to (B, L) with 0 as `text_tensors` pads the ids."""
    return {name: pad(rows, 0, side=side, multiple=multiple) for name, rows in kinds.items()}


def pad(
    rows: Sequence[Sequence[int]], value: int, *, side: Side = "right", multiple: int | None = None
) -> torch.Tensor:
    """Stack B lists of different length to (B, L) int64; `value` fills the gaps at `side`.

    >>> pad([[1, 2], [3]], 0, side="left")
    tensor([[1, 2],
            [0, 3]])
    """
    length = max(len(row) for row in rows)
    if multiple:
        length = -(-length // multiple) * multiple
    padded = torch.full((len(rows), length), value, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[i, at] = torch.tensor(row, dtype=torch.long)
    return padded
