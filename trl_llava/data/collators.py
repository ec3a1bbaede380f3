"""Rows to padded batches: one collator for each stage.

All three take rows of the contract in `rows/contract.py`, decode their images when the batch is made, mix rows with
and without images, and never cut: a row that is too long is an error here and is left out beforehand by
`lengths.drop_overlong`. A batch in which no row has an image has no image tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.data.contract import RowError
from trl_llava.data.encoding import Answers, encode
from trl_llava.data.images import load_images
from trl_llava.data.lengths import check_lengths
from trl_llava.data.padding import pad, text_tensors
from trl_llava.data.pairs import encode_pairs
from trl_llava.models.shared_prefix import pack_pairs
from trl_llava.prompts import JudgingPrompt, Message, judging_messages

IGNORED = -100
"""Label of a token that no loss is computed for."""

Row = dict[str, Any]


@dataclass
class PromptCollator:
    """Prompts to be answered, left-padded so that generation starts at one position.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        max_prompt_length: Longest prompt in tokens, image tokens included; `None` for no limit.
        columns: Which further columns of the rows go to `columns`; `None` for all.

    Example:
        Words are tokens (`<pad>` 0, `<s>` 1, `</s>` 2, `<image>` 3, `USER:` 4, `ASSISTANT:` 5), a picture takes four.

        >>> picture, hi = {"type": "image"}, {"type": "text", "text": "Hi"}
        >>> rows = [
        ...     {"row_name": "a[0]", "images": [red], "prompt": [{"role": "user", "content": [picture, hi]}]},
        ...     {"row_name": "a[1]", "images": [], "prompt": [{"role": "user", "content": [hi]}]},
        ... ]
        >>> batch = PromptCollator(processor)(rows)
        >>> batch["input_ids"]
        tensor([[1, 4, 3, 3, 3, 3, 6, 5],
                [0, 0, 0, 0, 1, 4, 6, 5]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1, 1, 1, 1, 1],
                [0, 0, 0, 0, 1, 1, 1, 1]])
        >>> batch["pixel_values"].shape  # one picture
        torch.Size([1, 3, 4, 4])
        >>> batch["columns"]["row_name"]
        ['a[0]', 'a[1]']
    """

    limit: ClassVar[str] = "max_prompt_length"

    processor: ProcessorMixin | PreTrainedTokenizerBase
    max_prompt_length: int | None = None
    columns: tuple[str, ...] | None = None

    def conversations(self, row: Row) -> list[list[Message]]:
        """Return the conversations of a row that take part in a batch: its prompt."""
        return [row["prompt"]]

    def rendering(self) -> dict[str, Any]:
        """Return the flags of `encode` for this stage."""
        return {"add_generation_prompt": True}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of B prompts of up to Q tokens.

        Args:
            rows: B rows of the prompt stage.

        Returns:
            `input_ids` (B, Q) and `attention_mask` (B, Q), both int64 and left-padded, the image tensors of the
            processor (`pixel_values` (I, ...), ...), and `columns`: `prompts`, `images` (decoded) and the other
            columns of the rows, each a list of B.

        Raises:
            RowError: If an image cannot be read, or a prompt is too long.
        """
        images = load_images(rows)
        encoding = encode(
            self.processor, [row["prompt"] for row in rows], images, row_names=_names(rows), **self.rendering()
        )
        check_lengths(encoding.input_ids, _names(rows), self)
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "images"))
        if self.columns is not None:
            names = dict.fromkeys(name for name in names if name in self.columns)
        return {
            **text_tensors(self.processor, encoding.input_ids, side="left"),
            **encoding.image_inputs,
            "columns": {
                "prompts": [row["prompt"] for row in rows],
                "images": images,
                **{name: [row.get(name) for row in rows] for name in names},
            },
        }


@dataclass
class SFTCollator:
    """Conversations to be learned, right-padded, with labels on answers only.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        max_length: Longest conversation in tokens, image tokens included; `None` for no limit.
        labels_on: `answers` for every assistant turn, `completion` for the last one, `all` for every token but those
            of images. An answer includes the token that ends its turn.
        pad_to_multiple_of: Round the padded length up to a multiple of this.

    Example:
        With the tokenizer of `PromptCollator`'s example, where `What` is 7, `cat` 8 and `dog` 9:

        >>> picture, what = {"type": "image"}, {"type": "text", "text": "What"}
        >>> rows = [
        ...     {"row_name": "a[0]", "images": [red], "prompt": [{"role": "user", "content": [picture, what]}],
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
        """Return the conversations of a row that take part in a batch: prompt and completion."""
        return [[*row["prompt"], *row["completion"]]]

    def rendering(self) -> dict[str, Any]:
        """Return the flags of `encode` for this stage."""
        # `all` locates the answers too: their stop token is checked there.
        answers: Answers = "last" if self.labels_on == "completion" else "all"
        return {"answers": answers}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of B conversations of up to L tokens.

        Args:
            rows: B rows of the sft stage.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each (B, L) int64 and right-padded; `labels` is -100 wherever
            nothing is learned. Also the image tensors of the processor.

        Raises:
            RowError: If an image cannot be read, or a conversation is too long.
        """
        conversations = [self.conversations(row)[0] for row in rows]
        encoding = encode(self.processor, conversations, load_images(rows), row_names=_names(rows), **self.rendering())
        check_lengths(encoding.input_ids, _names(rows), self)
        labels = [
            [
                token if (learned or self.labels_on == "all") and not pictured else IGNORED
                for token, learned, pictured in zip(*row, strict=True)
            ]
            for row in zip(encoding.input_ids, encoding.answer_mask, encoding.image_mask, strict=True)
        ]
        multiple = self.pad_to_multiple_of
        return {
            **text_tensors(self.processor, encoding.input_ids, multiple=multiple),
            "labels": pad(labels, IGNORED, multiple=multiple),
            **encoding.image_inputs,
        }


@dataclass
class PreferenceCollator:
    """Pairs of answers to be compared: all chosen ones, then all rejected ones, right-padded.

    Args:
        processor: A processor, or the tokenizer of a text-only model.
        max_length: Longest conversation in tokens, image tokens and judging turn included; `None` for no limit.
        judging_prompt: The judging turn that is appended to each conversation; `None` scores the conversation itself,
            at the end of the answer.
        pad_to_multiple_of: Round the padded length up to a multiple of this.
        share_prefix: Lay both answers of a pair behind what they have in common, as one row; for models that take
            `segments`.

    Example:
        With the tokenizer of `SFTCollator`'s example; two rows of ids for one pair, and one picture:

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
        """Return the conversations of a row that take part in a batch: the one with the chosen answer, then the other.

        Args:
            row: A row of the preference stage.

        Returns:
            Two conversations, with the judging turn if there is one.

        Raises:
            RowError: If the judging prompt wants captions and the row has none.
        """
        pair = [[*row["prompt"], *row[answer]] for answer in ("chosen", "rejected")]
        if self.judging_prompt is None:
            return pair
        if self.judging_prompt.with_captions and not row.get("captions"):
            raise RowError(
                row["row_name"],
                "it has no captions, but the judging prompt shows them",
                "Give a `captions` column or captions_file, leave the row out, or set with_captions to false",
            )
        return [judging_messages(conversation, row.get("captions"), self.judging_prompt) for conversation in pair]

    def rendering(self) -> dict[str, Any]:
        """Return the flags of `encode` for this stage."""
        judged = self.judging_prompt is not None
        return {"continue_final_message": judged, "judging_turn": judged}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of B pairs of up to L tokens.

        Args:
            rows: B rows of the preference stage.

        Returns:
            `input_ids` and `attention_mask`, each (2B, L) int64 and right-padded; row `i` is the chosen and row
            `B + i` the rejected answer of pair `i`. With images also the processor's image tensors, once per pair
            (I images of B rows), and `image_copies`, which is 2. With a `margin` column `margin` (B,), float32. With
            `share_prefix`, `input_ids` and `attention_mask` are (B, L), row `i` holding pair `i`, with `position_ids`
            and `segments` beside them and no `image_copies`.

        Raises:
            RowError: If an image cannot be read, captions or margins are missing, or a conversation is too long.
        """
        encoding = encode_pairs(self, rows)
        multiple, ids = self.pad_to_multiple_of, encoding.input_ids
        batch: dict[str, Any] = dict(encoding.image_inputs)
        if self.share_prefix:
            batch |= pack_pairs(ids[: len(rows)], ids[len(rows) :], multiple)._asdict()
        else:
            batch |= text_tensors(self.processor, ids, multiple=multiple)
            batch |= {"image_copies": 2} if encoding.image_inputs else {}
        if any("margin" in row for row in rows):
            batch["margin"] = torch.tensor(_margins(rows), dtype=torch.float32)
        return batch


def _names(rows: Sequence[Row]) -> list[str]:
    return [row["row_name"] for row in rows]


def _margins(rows: Sequence[Row]) -> list[float]:
    for row in rows:
        if row.get("margin") is None:
            raise RowError(row["row_name"], "it has no margin, but other rows have one", "Add it, or drop the column")
    return [float(row["margin"]) for row in rows]
