"""Rows to the batches of PPO: which rows a step answers, and how policy and value model each see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from trl_llava.collators import PromptCollator
from trl_llava.configs_ppo import LlavaPPOConfig
from trl_llava.randomness import RolloutBatches


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
