"""Factually augmented RLHF for LLaVA-family models, as a thin layer over TRL."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_llava.configs.ppo import LlavaPPOConfig
    from trl_llava.configs.reward import LlavaRewardConfig
    from trl_llava.configs.sft import LlavaSFTConfig
    from trl_llava.data.load import load_rows
    from trl_llava.data.trl_rows import as_trl_reads
    from trl_llava.ppo_trainer import LlavaPPOTrainer
    from trl_llava.reward_trainer import LlavaRewardTrainer
    from trl_llava.rewards.factual_reward import FactualReward
    from trl_llava.sft_trainer import LlavaSFTTrainer

__version__ = "0.1.0.dev0"
__all__ = [
    "FactualReward",
    "LlavaPPOConfig",
    "LlavaPPOTrainer",
    "LlavaRewardConfig",
    "LlavaRewardTrainer",
    "LlavaSFTConfig",
    "LlavaSFTTrainer",
    "as_trl_reads",
    "load_rows",
]
_HOMES = {
    "FactualReward": "trl_llava.rewards.factual_reward",
    "LlavaPPOConfig": "trl_llava.configs.ppo",
    "LlavaPPOTrainer": "trl_llava.ppo_trainer",
    "LlavaRewardConfig": "trl_llava.configs.reward",
    "LlavaRewardTrainer": "trl_llava.reward_trainer",
    "LlavaSFTConfig": "trl_llava.configs.sft",
    "LlavaSFTTrainer": "trl_llava.sft_trainer",
    "as_trl_reads": "trl_llava.data.trl_rows",
    "load_rows": "trl_llava.data.load",
}

# Where bitsandbytes is installed, importing it complains about an optional CPU kernel; 4 bit works without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Imports a public class when it is first used, so that `import trl_llava` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
