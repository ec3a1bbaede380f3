"""Lists of different length to padded tensors."""

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.errors import InputError

Side = Literal["left", "right"]


def text_tensors(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    *,
    side: Side = "right",
    multiple: int | None = None,
) -> dict[str, torch.Tensor]:
    """Pad ids with the tokenizer's pad token and mark which are real.

    Args:
        processor: A processor or a tokenizer.
        ids: B rows of ids.
        side: Where the padding goes; the tokenizer's own `padding_side` does not count.
        multiple: Round the length up to a multiple of this.

    Returns:
        `input_ids` and `attention_mask` (1 on real tokens), both (B, L) int64.

    Raises:
        ValueError: If the tokenizer has no pad token.
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


def pad(
    rows: Sequence[Sequence[int]], value: int, *, side: Side = "right", multiple: int | None = None
) -> torch.Tensor:
    """Stack rows of different length.

    Args:
        rows: B rows.
        value: What fills the gaps.
        side: Where they are.
        multiple: Round the length up to a multiple of this.

    Returns:
        (B, L) int64.

    Example:
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
