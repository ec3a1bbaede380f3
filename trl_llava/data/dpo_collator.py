"""Preference rows to the batches of TRL's `DPOTrainer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import ProcessorMixin

from trl_llava.data.padding import pad, text_tensors
from trl_llava.data.pairs import encode_pairs
from trl_llava.prompts import Message


@dataclass
class DPOCollator:
    """Pairs of answers for DPO: all chosen ones, then all rejected ones, right-padded; captions are not read.

    TRL's own collator tokenises prompt and answer apart and without a BOS, so that a policy would learn from other ids
    than those of SFT and PPO, and it cuts rows that are too long.

    Args:
        processor: The policy's processor.
        max_length: Longest conversation in tokens, image tokens included; `None` for no limit.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Example:
        With the tokenizer of `SFTCollator`'s example; two rows of ids for one pair, and its picture twice:

        >>> rows = [
        ...     {
        ...         "row_name": "a[0]",
        ...         "images": [red],
        ...         "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]}],
        ...         "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "cat"}]}],
        ...         "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "dog dog"}]}],
        ...     },
        ... ]
        >>> batch = DPOCollator(processor)(rows)
        >>> batch["input_ids"]
        tensor([[1, 4, 3, 3, 3, 3, 7, 5, 8, 2, 0],
                [1, 4, 3, 3, 3, 3, 7, 5, 9, 9, 2]])
        >>> batch["completion_mask"]
        tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])
        >>> batch["pixel_values"].shape
        torch.Size([2, 3, 4, 4])
    """

    limit: ClassVar[str] = "max_length"

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def conversations(self, row: dict[str, Any]) -> list[list[Message]]:
        """Return the conversations of a row that take part in a batch: the one with the chosen answer, the other."""
        return [[*row["prompt"], *row[answer]] for answer in ("chosen", "rejected")]

    def rendering(self) -> dict[str, Any]:
        """Return the flags of `encode` for this stage."""
        return {"answers": "last"}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of B pairs of up to L tokens.

        Args:
            rows: B rows of the preference stage.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask`, each (2B, L) int64; the latter is 1 on the answer and
            the token that ends it. Also the image tensors of the processor, for chosen and rejected each.

        Raises:
            RowError: If an image cannot be read, or a conversation is too long.
        """
        encoding = encode_pairs(self, rows)
        multiple = self.pad_to_multiple_of
        answers = [[int(is_answer) for is_answer in row] for row in encoding.answer_mask]
        return {
            **text_tensors(self.processor, encoding.input_ids, multiple=multiple),
            "completion_mask": pad(answers, 0, multiple=multiple),
            **{name: torch.cat([tensor, tensor]) for name, tensor in encoding.image_inputs.items()},
        }
