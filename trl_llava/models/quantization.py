"""4 and 8 bit base models: only the language model's layers, and differentiable wherever they run.

On a GPU an 8-bit layer rounds its inputs to 8 bit too, in training as without; on a CPU bitsandbytes does so only
outside of training, and a PPO ratio before the first update is 1 to two digits only.
"""

import importlib.util
import logging

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import get_quantization_config

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, MissingPackageError
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES

# Patterns of module names. Image features must not depend on quantisation, and the score head is trained.
UNQUANTIZED = [rf"(?:.*\.)?{name}" for name in (*TOWER_NAMES, *PROJECTOR_NAMES, "lm_head", "score")]


def quantization_config(model_args: LlavaModelConfig) -> BitsAndBytesConfig:
    """TRL's configuration for a recipe with `load_in_4bit` or `load_in_8bit`, with `UNQUANTIZED` left alone."""
    field = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"{field} needs bitsandbytes, which is not installed: `pip install trl-llava[qlora]`"
        )
    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"{field} does not go with ZeRO-3, which cannot share packed weights out over processes. Use it under "
            "DDP or ZeRO-2 (`--accelerate_config ddp` or `zero2`), or ZeRO-3 with a base in 16 bit"
        )
    if model_args.load_in_4bit and model_args.dtype in (None, "auto"):
        raise InputError(f"{field} needs a dtype to compute in: set dtype to bfloat16 (found {model_args.dtype!r})")
    config = get_quantization_config(model_args)
    config.llm_int8_skip_modules = list(UNQUANTIZED)
    if model_args.load_in_8bit:
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
    return config


def _is_no_cast(record: logging.LogRecord) -> bool:
    """Keep out what bitsandbytes says of bf16 inputs in every layer of every pass, and nobody can change."""
    return "inputs will be cast" not in str(record.msg)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for CPUs with AVX512-BF16.

    It does so in the first pass without gradients, a rollout say, and every later backward pass through those weights
    then stops there with no more than a warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
