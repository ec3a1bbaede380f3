"""Rows to the batches of PPO: which rows a step answers, and how policy and value model each see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.data.collators import PromptCollator
from trl_llava.data.contract import check_one_image
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.load import rows_from
from trl_llava.models.model_inputs import counts_images
from trl_llava.ppo.randomness import RolloutBatches


@dataclass
class PolicyAndValueCollator:
    """Encode each batch twice: for the policy, and under "value" for a value model with a processor of its own.

    Attributes:
        policy: the policy's collator.
        value: the value model's collator.
    """

    policy: PromptCollator
    value: PromptCollator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Encode B rows.

        Args:
            rows: B rows.

        Returns:
            The policy's batch, and the value model's under "value".
        """
        return {**self.policy(rows), "value": self.value(rows)}


def collator_of_both(
    collator: PromptCollator,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    value_processing_class: ProcessorMixin | PreTrainedTokenizerBase | None,
) -> PromptCollator | PolicyAndValueCollator:
    """Encode a batch as often as policy and value model see it differently.

    Args:
        collator: the policy's.
        processing_class: the policy's processor.
        value_processing_class: the value model's; `None` if it is the same.

    Returns:
        The policy's collator, or one for both.
    """
    if value_processing_class is None or value_processing_class is processing_class:
        return collator
    return PolicyAndValueCollator(collator, PromptCollator(value_processing_class, max_prompt_length=None))


def prompt_rows(
    dataset: Dataset, name: str, collator: PromptCollator, args: LlavaPPOConfig, *, require_captions: bool
) -> Dataset:
    """The rows that a run can ask, checked before its first step.

    Args:
        dataset: rows in the project's or in TRL's format.
        name: what errors call the data set.
        collator: knows how long a prompt may be.
        args: what happens to longer ones.
        require_captions: whether the reward cannot be computed without.

    Returns:
        The rows.

    Raises:
        RowError: if a row cannot be used, has no captions where they are needed, or has pictures that vLLM, if it
            is to answer, would process otherwise than the policy does.
    """
    rows = rows_from(dataset, "prompt", name=name, require_captions=require_captions)
    if args.use_vllm and counts_images(collator.processor):
        # LLaVA-OneVision's processor cuts an image into tiles where it is the only one of its row; vLLM cuts up each.
        for row in rows.select_columns(["row_name", "images"]):
            check_one_image(row["images"], row["row_name"], "vLLM")
    return drop_overlong(rows, collator, args.overlong)


def rollout_loader(
    dataset: Dataset,
    collator: PromptCollator | PolicyAndValueCollator,
    args: LlavaPPOConfig,
    accelerator: Accelerator,
    first_step: int,
) -> DataLoader:
    """The batches of this process, one for each step from `first_step` on.

    Differs from TRL's loader in that a batch depends on seed and step alone, so that a resumed run sees what the
    uninterrupted one saw.

    Args:
        dataset: the rows.
        collator: encodes a batch.
        args: the config, its batch sizes computed.
        accelerator: knows this process.
        first_step: the first step, counted from 0.

    Returns:
        A loader of one batch per step.

    Raises:
        ValueError: if there are fewer rows than a batch takes.
    """
    assert args.batch_size is not None and args.num_total_batches is not None  # `compute_batch_sizes` has set them
    batches = RolloutBatches(
        len(dataset),
        args.batch_size // args.num_generations_per_prompt,
        (accelerator.process_index, accelerator.num_processes),
        args.seed,
        range(first_step, args.num_total_batches),
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),  # else each new loader draws from the global one
        pin_memory=args.dataloader_pin_memory and accelerator.device.type == "cuda",
    )
