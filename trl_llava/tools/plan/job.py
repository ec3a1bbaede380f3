"""What is planned: a stage of a recipe, the settings that a search may change, and what they turn out to need."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.tools.plan.memory_model import Moment
from trl_llava.tools.plan.sharing import Processes
from trl_llava.tools.plan.starts import Sources


@dataclass(frozen=True)
class Settings:
    """What a search may change.

    Attributes:
        rows: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        checkpointing: `gradient_checkpointing`.
        four_bit: `load_in_4bit`.
        rollout_rows: `local_rollout_forward_batch_size`, for PPO.
    """

    rows: int
    accumulation: int
    checkpointing: bool
    four_bit: bool
    rollout_rows: int | None = None


@dataclass(frozen=True)
class Job:
    """A stage of a recipe.

    Attributes:
        stage: sft, reward or ppo.
        values: Every field of the recipe.
        model_args: Its model fields.
        processes: How it is shared out.
        images: Pictures per row.
        length: L, the longest row in tokens; for PPO the longest prompt.
        sources: Where to look for what an earlier stage has yet to write.
        limit: Bytes of the GPU that there are for tensors; None for a CPU.
        judged_length: Tokens that the reward model of PPO reads of a row; None looks them up.
        shared_length: Tokens that both answers of a pair begin with; None for those of the image.
    """

    stage: str
    values: dict[str, Any]
    model_args: LlavaModelConfig
    processes: Processes
    images: int
    length: int
    sources: Sources = field(default_factory=Sources)
    limit: int | None = None
    judged_length: int | None = None
    shared_length: int | None = None

    @property
    def bf16(self) -> bool:
        """Whether it trains in bf16; TRL does so by default.

        Returns:
            Whether.
        """
        bf16, fp16 = self.values["bf16"], self.values["fp16"]
        return bool(not fp16 if bf16 is None else bf16)

    @property
    def autocast(self) -> bool:
        """Whether passes run under autocast; with DeepSpeed the weights are in bf16 instead.

        Returns:
            Whether.
        """
        return self.bf16 and not self.processes.deepspeed

    def given(self, settings: Settings) -> LlavaModelConfig:
        """The model fields with a search's choice of 4 bits.

        Args:
            settings: The choice.

        Returns:
            A copy.
        """
        changed = copy.copy(self.model_args)
        changed.load_in_4bit = settings.four_bit
        changed.load_in_8bit = self.model_args.load_in_8bit and not settings.four_bit
        return changed


@dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        moments: The worst moment of each phase of a step, of one process.
        host: Bytes of the CPU's memory by what they are for, of one process.
        notes: What was decided on the way, and what was taken from elsewhere.
    """

    moments: list[Moment]
    host: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Moment:
        """The phase that decides.

        Returns:
            Its worst moment.
        """
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def totals(self) -> dict[str, int]:
        """What each phase needs.

        Returns:
            Phase -> bytes.
        """
        return {moment.phase: moment.total for moment in self.moments}
