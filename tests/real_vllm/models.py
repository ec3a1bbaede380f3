"""The tiny models of the other tests with heads of 32, the smallest that vLLM's attention on CPUs knows."""

from pathlib import Path

import tiny_models
from transformers import AutoProcessor, LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

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
    if family == "llava_onevision":  # with the video part, which vLLM wants
        _with_video(folder)
    return folder


def _with_video(folder: Path) -> None:
    size = {"height": tiny_models.IMAGE_SIZE, "width": tiny_models.IMAGE_SIZE}
    images = tiny_models.onevision_processor()
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiny_models.GRID_PINPOINTS),
        images.tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=images.num_image_tokens,
        vision_feature_select_strategy="full",
        chat_template=images.chat_template,
    ).save_pretrained(folder)
    assert type(AutoProcessor.from_pretrained(folder)) is LlavaOnevisionProcessor
