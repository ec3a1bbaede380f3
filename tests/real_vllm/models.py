"""The tiny models of the other tests with heads of 32, the smallest that vLLM's attention on CPUs knows."""

from pathlib import Path
from unittest import mock

import tiny_families
import tiny_models

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")
TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def make(family: str, folder: Path) -> Path:
    """A folder with one of `FAMILIES`, small and random."""
    text, vision, qwen = tiny_models.text_config, tiny_models.vision_config, tiny_families.qwen_config

    def qwen_config(tokenizer: object, more: dict, tower: dict) -> dict:
        tower = {**tower, "hidden_size": 64, "out_hidden_size": 64}
        return qwen(tokenizer, more, tower, mrope_section=[8, 4, 4])

    def wide_text(size: int) -> dict:
        return {**text(size), **TEXT}

    with (
        mock.patch.multiple(tiny_models, text_config=wide_text, vision_config=lambda: {**vision(), "hidden_size": 64}),
        mock.patch.multiple(tiny_families, text_config=wide_text, qwen_config=qwen_config),
    ):
        tiny_families.FAMILIES[family](folder)
    return folder
