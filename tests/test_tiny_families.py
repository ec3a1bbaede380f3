"""The tiny models of the families are sound: they come back from their folders, generate, and see their image."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

# Image tokens of an image of 40 x 32 pixels, and of one of 96 x 40.
IMAGE_TOKENS = {
    "llava": (16, 16),
    "llava_next": (70, 52),
    "llava_onevision": (70, 52),
    "pixtral": (20, 32),
    "qwen2_vl": (20, 21),
    "qwen2_5_vl": (20, 21),
    "qwen3_vl": (20, 21),
    "internvl": (4, 12),
    "smolvlm": (20, 12),
    "idefics3": (20, 12),
    "gemma3": (4, 4),
    "paligemma2": (16, 16),
}


def read(processor: ProcessorMixin, color: str, size: tuple[int, int] = (40, 32)) -> BatchFeature:
    words = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    asked = [{"role": "user", "content": words}]
    text = "<image>What is it?"
    if processor.chat_template is not None:
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(text=[text], images=[tiny_models.image(color, size)], return_tensors="pt")
    inputs.pop("labels", None)  # PaliGemma's, which are not for training
    return inputs


@pytest.mark.parametrize("family", IMAGE_TOKENS)
def test_a_family_is_sound(family: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(family)
    processor = AutoProcessor.from_pretrained(folder)
    model, loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loaded.values())
    red, blue, large = (read(processor, *what) for what in (["red"], ["blue"], ["red", (96, 40)]))
    images = [int((inputs["input_ids"] == model.config.image_token_id).sum()) for inputs in (red, large)]
    assert tuple(images) == IMAGE_TOKENS[family]
    with torch.no_grad():
        first, second = (model(**inputs).logits[:, -1] for inputs in (red, blue))
        completion = model.generate(**large, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert (first - second).abs().max() > 0.1
    assert completion.shape[1] == large["input_ids"].shape[1] + 4


def test_only_paligemma_comes_without_a_chat_template(family_folder: Callable[[str], Path]) -> None:
    without = [name for name in IMAGE_TOKENS if not (family_folder(name) / "chat_template.jinja").exists()]
    assert without == ["paligemma2"]
