"""The tiny models of the other tests with heads of 32, the smallest that vLLM's attention on CPUs knows."""

from pathlib import Path

import tiny_models

FAMILIES = ("llava", "llava_next", "llava_onevision")


def make(family: str, folder: Path) -> Path:
    """A folder with one of `FAMILIES`, small and random."""
    text, vision = tiny_models.text_config, tiny_models.vision_config
    tiny_models.text_config = lambda size: {
        **text(size),
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tiny_models.vision_config = lambda: {**vision(), "hidden_size": 64}
    try:
        getattr(tiny_models, f"tiny_{family}")(folder)
    finally:
        tiny_models.text_config, tiny_models.vision_config = text, vision
    return folder
