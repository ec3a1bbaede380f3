"""The config of GRPO."""

from dataclasses import dataclass

from trl import GRPOConfig

from trl_llava.configs.online import OnlineArguments


@dataclass
class LlavaGRPOConfig(OnlineArguments, GRPOConfig):
    """TRL's GRPO config, plus the factual reward and limits for prompts with images."""
