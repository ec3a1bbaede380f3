"""Rows to the batches of PPO: which rows a step completes, and how policy and value model each see them."""

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
from trl_llava.data.thumbnails import image_name
from trl_llava.models.model_inputs import counts_images
from trl_llava.ppo.randomness import RolloutBatches


@dataclass
class PolicyAndValueCollator:
    """Encodes each batch twice: for the policy, and under "value" for a value model with a processor of its own."""

    policy: PromptCollator
    value: PromptCollator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self.policy(rows), "value": self.value(rows)}


def collator_of_both(
    collator: PromptCollator,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    value_processing_class: ProcessorMixin | PreTrainedTokenizerBase | None,
) -> PromptCollator | PolicyAndValueCollator:
    """The policy's collator, or one for both roles where policy and value model (`None`: the same) have two."""
    if value_processing_class is None or value_processing_class is processing_class:
        return collator
    return PolicyAndValueCollator(collator, PromptCollator(value_processing_class, max_prompt_length=None))


def sample_batch(rows: Sequence[dict[str, Any]], collator: PromptCollator) -> dict[str, Any]:
    """A batch of prompts for a table of samples, with the file names of the images of each row."""
    return {**collator(rows), "image_names": [[image_name(ref) for ref in row["images"]] for row in rows]}


def prompt_rows(
    dataset: Dataset, name: str, collator: PromptCollator, args: LlavaPPOConfig, positions: int | None, **read: Any
) -> Dataset:
    """The rows that a run can train on, checked before its first step; `name` is what errors call the data set.

    `positions` are those that the policy has for a prompt, `read` the options of `rows_from`. A row is refused that
    cannot be used, is longer than them, has no captions where a reward needs them, or has images that vLLM, where it
    generates, would process otherwise than the policy does.
    """
    rows = rows_from(dataset, "prompt", name=name, **read)
    if args.use_vllm and counts_images(collator.processor):
        # LLaVA-OneVision's processor cuts an image into tiles where it is the only one of its row; vLLM cuts up each.
        for row in rows.select_columns(["row_name", "images"]):
            check_one_image(row["images"], row["row_name"], "vLLM")
    return drop_overlong(rows, collator, args.overlong, positions=positions)


def rollout_loader(
    dataset: Dataset,
    collator: PromptCollator | PolicyAndValueCollator,
    args: LlavaPPOConfig,
    accelerator: Accelerator,
    first_step: int,
) -> DataLoader:
    """The batches of this process, one for each step from `first_step` (counted from 0) on.

    Differs from TRL's loader in that a batch depends on seed and step alone, so that a resumed run sees what the
    uninterrupted one saw. Fewer rows than a batch are a ValueError.
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
