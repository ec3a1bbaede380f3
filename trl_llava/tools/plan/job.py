"""What is planned: a stage of a recipe, the settings that a search may change, and what they turn out to need."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.tools.plan.processes import Processes
from trl_llava.tools.plan.starts import Sources

PARTS = (
    "base",
    "adapters",
    "heads",
    "gathered weights",
    "optimizer",
    "gradients",
    "activations",
    "image features",
    "KV cache",
    "logits",
)
"""All parts of the memory, in the order in which they are shown."""


@dataclass(frozen=True)
class Settings:
    """What a search may change."""

    rows: int  # per_device_train_batch_size
    accumulation: int  # gradient_accumulation_steps
    checkpointing: bool  # gradient_checkpointing
    four_bit: bool  # load_in_4bit
    rollout_rows: int | None = None  # local_rollout_forward_batch_size, for PPO


@dataclass(frozen=True)
class Job:
    """A stage of a recipe, how it is shared out, and how long its rows are."""

    stage: str  # sft, reward or ppo
    args: Any  # the stage's config
    model_args: LlavaModelConfig
    processes: Processes
    images: int  # of a row
    length: int  # L, the longest row in tokens; for PPO the longest prompt
    sources: Sources = field(default_factory=Sources)
    limit: int | None = None  # bytes of the GPU that there are for tensors; None for a CPU
    judged_length: int | None = None  # tokens that the reward model of PPO reads of a row; None looks them up
    shared_length: int | None = None  # tokens that both completions of a pair begin with; None for those of the image

    @property
    def bf16(self) -> bool:
        """Whether it trains in bf16; TRL does so by default."""
        return bool(not self.args.fp16 if self.args.bf16 is None else self.args.bf16)

    @property
    def autocast(self) -> bool:
        """Whether passes run under autocast; with DeepSpeed the weights are in bf16 instead."""
        return self.bf16 and not self.processes.deepspeed

    def with_bits(self, settings: Settings) -> LlavaModelConfig:
        """A copy of the model fields with a search's choice of 4 bits."""
        changed = copy.copy(self.model_args)
        changed.load_in_4bit = settings.four_bit
        changed.load_in_8bit = self.model_args.load_in_8bit and not settings.four_bit
        return changed


@dataclass
class Moment:
    """Bytes of each of `PARTS` at the worst moment of one phase of a step, of one process."""

    phase: str
    parts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parts.total()


@dataclass(frozen=True)
class Need:
    """What a run needs, of one process: the worst moment of each phase of a step."""

    moments: list[Moment]
    host: Counter[str] = field(default_factory=Counter)  # bytes of the CPU's memory by what they are for
    notes: list[str] = field(default_factory=list)  # what was decided on the way, or taken from elsewhere

    @property
    def worst(self) -> Moment:
        """The phase that decides, at its worst moment."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def totals(self) -> dict[str, int]:
        """Phase -> bytes."""
        return {moment.phase: moment.total for moment in self.moments}
