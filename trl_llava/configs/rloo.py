"""The config of RLOO."""

from dataclasses import dataclass

from trl import RLOOConfig

from trl_llava.configs.online import OnlineArguments


@dataclass
class LlavaRLOOConfig(OnlineArguments, RLOOConfig):
    """TRL's RLOO config, plus the factual reward and limits for prompts with images."""
