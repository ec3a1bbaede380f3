"""Pairs of completions to padded batches, for the reward model and for DPO; all as `collators.py` says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.batching import Row, encode_rows, kind_tensors, pad, text_tensors
from trl_llava.data.contract import RowError, check_captions
from trl_llava.data.images import load_images
from trl_llava.models.shared_prefix import pack_pairs
from trl_llava.prompts import JudgingPrompt, Message, judging_messages


@dataclass
class PreferenceCollator:
    """Pairs of completions to be compared: all chosen ones, then all rejected ones, right-padded.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        max_length: Longest conversation in tokens, image tokens and judging turn included; `None` for no limit.
        judging_prompt: The judging turn that is appended to each conversation; `None` scores the conversation itself,
            at the end of the completion.
        pad_to_multiple_of: Round the padded length up to a multiple of this.
        share_prefix: Lay both completions of a pair behind what they have in common, as one row; for models that take
            `segments`.

    Example:
        With the tokenizer of `SFTCollator`'s example; two rows of ids for one pair, and one image:

        >>> rows = [
        ...     {
        ...         "row_name": "a[0]",
        ...         "images": [red],
        ...         "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]}],
        ...         "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "cat"}]}],
        ...         "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "dog dog"}]}],
        ...     },
        ... ]
        >>> batch = PreferenceCollator(processor)(rows)
        >>> batch["input_ids"]
        tensor([[1, 4, 3, 3, 3, 3, 7, 5, 8, 2, 0],
                [1, 4, 3, 3, 3, 3, 7, 5, 9, 9, 2]])
        >>> batch["pixel_values"].shape, batch["image_copies"]
        (torch.Size([1, 3, 4, 4]), 2)
        >>> batch = PreferenceCollator(processor, share_prefix=True)(rows)
        >>> batch["input_ids"]
        tensor([[1, 4, 3, 3, 3, 3, 7, 5, 8, 2, 9, 9, 2]])
        >>> batch["segments"]
        tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2]])
        >>> batch["position_ids"]
        tensor([[ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  8,  9, 10]])
    """

    limit: ClassVar[str] = "max_length"

    processor: ProcessorMixin | PreTrainedTokenizerBase
    max_length: int | None = None
    judging_prompt: JudgingPrompt | None = None
    pad_to_multiple_of: int | None = None
    share_prefix: bool = False

    def conversations(self, row: Row) -> list[list[Message]]:
        """A row takes part with the conversation that ends with `chosen`, then the other, each judged."""
        pair = _both(row)
        if self.judging_prompt is None:
            return pair
        if self.judging_prompt.with_captions:
            check_captions(row.get("captions"), row["row_name"])
        return [judging_messages(conversation, row.get("captions"), self.judging_prompt) for conversation in pair]

    def rendering(self) -> dict[str, Any]:
        """The flags of `encode` for this stage."""
        judged = self.judging_prompt is not None
        return {"continue_final_message": judged, "judging_turn": judged}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of B pairs of up to L tokens.

        Args:
            rows: B rows of the preference stage.

        Returns:
            `input_ids` and `attention_mask`, each (2B, L) int64 and right-padded; row `i` is the chosen and row
            `B + i` the rejected completion of pair `i`. With images also the processor's image tensors, once per pair
            (I images of B rows), and `image_copies`, which is 2. With a `margin` column `margin` (B,), float32. With
            `share_prefix`, `input_ids` and `attention_mask` are (B, L), row `i` holding pair `i`, with `position_ids`
            and `segments` beside them and no `image_copies`.

        Raises:
            RowError: If an image cannot be read, captions or margins are missing, or a conversation is too long.
        """
        encoding = encode_rows(self, rows, load_images(rows))
        multiple, ids = self.pad_to_multiple_of, encoding.input_ids
        batch: dict[str, Any] = dict(encoding.images.tensors)
        if self.share_prefix:
            batch |= pack_pairs(ids[: len(rows)], ids[len(rows) :], multiple)._asdict()
        else:
            batch |= text_tensors(self.processor, ids, multiple=multiple)
            batch |= kind_tensors(encoding.token_kinds, multiple=multiple)
            batch |= {"image_copies": 2} if encoding.images.tensors else {}
        if any("margin" in row for row in rows):
            batch["margin"] = torch.tensor(_margins(rows), dtype=torch.float32)
        return batch


@dataclass
class DPOCollator:
    """Pairs of completions for DPO: all chosen ones, then all rejected ones, right-padded; captions are not read.

    TRL's own collator tokenises prompt and completion apart and without a BOS, so that a policy would learn from other
    ids than those of SFT and PPO, and it cuts rows that are too long.

    Args:
        processor: The policy's processor.
        max_length: Longest conversation in tokens, image tokens included; `None` for no limit.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Example:
        With the processor and the rows of `PreferenceCollator`'s example; the image comes twice:

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

    def conversations(self, row: Row) -> list[list[Message]]:
        """A row takes part in a batch with the conversation that ends with `chosen`, then the other."""
        return _both(row)

    def rendering(self) -> dict[str, Any]:
        """The flags of `encode` for this stage."""
        return {"assistant_turns": "last"}

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Make a batch of B pairs of up to L tokens.

        Args:
            rows: B rows of the preference stage.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask`, each (2B, L) int64; the latter is 1 on the completion
            and the token that ends it. Also the image tensors of the processor, for chosen and rejected each.

        Raises:
            RowError: If an image cannot be read, or a conversation is too long.
        """
        encoding = encode_rows(self, rows, load_images(rows))
        multiple = self.pad_to_multiple_of
        return {
            **text_tensors(self.processor, encoding.input_ids, multiple=multiple),
            "completion_mask": pad(encoding.assistant_mask, 0, multiple=multiple),
            **kind_tensors(encoding.token_kinds, multiple=multiple),
            **{name: torch.cat([tensor, tensor]) for name, tensor in encoding.images.tensors.items()},
        }


def _both(row: Row) -> list[list[Message]]:
    return [[*row["prompt"], *row["chosen"]], [*row["prompt"], *row["rejected"]]]


def _margins(rows: Sequence[Row]) -> list[float]:
    for row in rows:
        if row.get("margin") is None:
            raise RowError(row["row_name"], "it has no margin, but other rows have one", "Add it, or drop the column")
    return [float(row["margin"]) for row in rows]
