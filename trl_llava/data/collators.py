"""Rows to padded batches: prompts for PPO, GRPO and RLOO, and conversations for SFT.

The collators take rows of the contract in `contract.py`, decode their images when the batch is made, mix rows with
and without images, and never cut: a row that is too long is an error here and is left out beforehand by
`lengths.drop_overlong`. A batch in which no row has an image has no image tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.batching import Row, encode_rows, kind_tensors, pad, text_tensors
from trl_llava.data.images import load_images
from trl_llava.prompts import Message

IGNORED = -100
"""Label of a token that no loss is computed for."""


@dataclass
class PromptCollator:
    """Prompts to be completed, left-padded so that generation starts at one position.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        max_prompt_length: Longest prompt in tokens, image tokens included; `None` for no limit.
        columns: Which further columns of the rows go to `columns`; `None` for all.

    Example:
        Words are tokens (`<pad>` 0, `<s>` 1, `</s>` 2, `<image>` 3, `USER:` 4, `ASSISTANT:` 5), an image takes four.

        >>> image, hi = {"type": "image"}, {"type": "text", "text": "Hi"}
        >>> rows = [
        ...     {"row_name": "a[0]", "images": [red], "prompt": [{"role": "user", "content": [image, hi]}]},
        ...     {"row_name": "a[1]", "images": [], "prompt": [{"role": "user", "content": [hi]}]},
        ... ]
        >>> batch = PromptCollator(processor)(rows)
        >>> batch["input_ids"]
        tensor([[1, 4, 3, 3, 3, 3, 6, 5],
                [0, 0, 0, 0, 1, 4, 6, 5]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1, 1, 1, 1, 1],
                [0, 0, 0, 0, 1, 1, 1, 1]])
        >>> batch["pixel_values"].shape  # one image
        torch.Size([1, 3, 4, 4])
        >>> batch["columns"]["row_name"]
        ['a[0]', 'a[1]']
    """

    limit: ClassVar[str] = "max_prompt_length"

    processor: ProcessorMixin | PreTrainedTokenizerBase
    max_prompt_length: int | None = None
    columns: tuple[str, ...] | None = None

    def conversations(self, row: Row) -> list[list[Message]]:
        """A row takes part in a batch with its prompt."""
        return [row["prompt"]]

    def rendering(self) -> dict[str, Any]:
        """The flags of `encode` for this stage."""
        return {"add_generation_prompt": True}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of B prompts of up to Q tokens.

        Args:
            rows: B rows of the prompt stage.

        Returns:
            `input_ids` (B, Q) and `attention_mask` (B, Q), both int64 and left-padded; what kind each token is, (B, Q)
            too, where the model takes that; the image tensors of the processor (`pixel_values` (I, ...), ...), and
            `image_counts`, by name how many of their entries each row has; `columns`: `prompts`, `images` (decoded)
            and the other columns of the rows, each a list of B.

        Raises:
            RowError: If an image cannot be read, or a prompt is too long.
        """
        images = load_images(rows)
        encoding = encode_rows(self, rows, images)
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "images"))
        if self.columns is not None:
            names = dict.fromkeys(name for name in names if name in self.columns)
        return {
            **text_tensors(self.processor, encoding.input_ids, side="left"),
            **kind_tensors(encoding.token_kinds, side="left"),
            **encoding.images.tensors,
            "image_counts": encoding.images.counts,
            "columns": {
                "prompts": [row["prompt"] for row in rows],
                "images": images,
                **{name: [row.get(name) for row in rows] for name in names},
            },
        }


@dataclass
class SFTCollator:
    """Conversations to be learned, right-padded, with labels on assistant turns only.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        max_length: Longest conversation in tokens, image tokens included; `None` for no limit.
        labels_on: `answers` for every assistant turn, `completion` for the last one, `all` for every token but those
            of images. A turn includes the token that ends it.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Example:
        With the tokenizer of `PromptCollator`'s example, where `What` is 7, `cat` 8 and `dog` 9:

        >>> image, what = {"type": "image"}, {"type": "text", "text": "What"}
        >>> rows = [
        ...     {"row_name": "a[0]", "images": [red], "prompt": [{"role": "user", "content": [image, what]}],
        ...      "completion": [{"role": "assistant", "content": [{"type": "text", "text": "cat"}]}]},
        ...     {"row_name": "a[1]", "images": [], "prompt": [{"role": "user", "content": [what]}],
        ...      "completion": [{"role": "assistant", "content": [{"type": "text", "text": "dog dog"}]}]},
        ... ]
        >>> batch = SFTCollator(processor)(rows)
        >>> batch["input_ids"]
        tensor([[1, 4, 3, 3, 3, 3, 7, 5, 8, 2],
                [1, 4, 7, 5, 9, 9, 2, 0, 0, 0]])
        >>> batch["labels"]
        tensor([[-100, -100, -100, -100, -100, -100, -100, -100,    8,    2],
                [-100, -100, -100, -100,    9,    9,    2, -100, -100, -100]])
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'labels', 'pixel_values']
    """

    limit: ClassVar[str] = "max_length"

    processor: ProcessorMixin | PreTrainedTokenizerBase
    max_length: int | None = None
    labels_on: Literal["answers", "completion", "all"] = "answers"
    pad_to_multiple_of: int | None = None

    def conversations(self, row: Row) -> list[list[Message]]:
        """A row takes part in a batch with prompt and completion."""
        return [[*row["prompt"], *row["completion"]]]

    def rendering(self) -> dict[str, Any]:
        """The flags of `encode` for this stage."""
        # `all` locates the assistant turns too: their stop token is checked there.
        return {"assistant_turns": "last" if self.labels_on == "completion" else "all"}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of B conversations of up to L tokens.

        Args:
            rows: B rows of the sft stage.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each (B, L) int64 and right-padded; `labels` is -100 wherever
            nothing is learned. Also the image tensors of the processor, and what kind each token is, (B, L), where the
            model takes that.

        Raises:
            RowError: If an image cannot be read, or a conversation is too long.
        """
        encoding = encode_rows(self, rows, load_images(rows))
        labels = [
            [
                token if (learned or self.labels_on == "all") and not of_image else IGNORED
                for token, learned, of_image in zip(*row, strict=True)
            ]
            for row in zip(encoding.input_ids, encoding.assistant_mask, encoding.image_mask, strict=True)
        ]
        multiple = self.pad_to_multiple_of
        return {
            **text_tensors(self.processor, encoding.input_ids, multiple=multiple),
            "labels": pad(labels, IGNORED, multiple=multiple),
            **kind_tensors(encoding.token_kinds, multiple=multiple),
            **encoding.images.tensors,
        }
