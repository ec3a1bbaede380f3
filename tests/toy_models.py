"""The recipes' models at toy size: an eighth of the layers, a sixty-fourth (LLaVA-1.5) or a sixteenth (OneVision)
of the width, patches of 2 pixels as many as the real towers have, and the real ratio of tower to language model.
"""

from pathlib import Path

import tiny_models
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE

PATCH = 2
# Real: 7B 32 layers, 4096 wide, 32 heads, 11008 inside; 13B 40, 5120, 40, 13824; CLIP-L/14 24, 1024, 16, 4096.
VICUNA = {"7b": (4, 64, 4, 172), "13b": (5, 80, 5, 216)}
CLIP = (3, 16, 2, 64)
# llava-hf's templates, which write nothing a model could learn to stop at, or begin completions with another space.
NO_STOP = VICUNA_V1_CHAT_TEMPLATE.replace(" + eos_token", " + ' '")
OTHER_START = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sizes(layers: int, width: int, heads: int, inside: int) -> dict[str, int]:
    """The four sizes by the names that all configs share."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (layers, width, heads, inside), strict=True))


def llava_1_5(folder: Path, size: str, pixels: int, *, chat_template: str = VICUNA_V1_CHAT_TEMPLATE) -> Path:
    """LLaVA-1.5 of `size` "7b" or "13b" with the tower for `pixels` 224 or 336: 256 or 576 patches."""
    side = pixels // 14 * PATCH
    tokenizer = tiny_models.tiny_tokenizer()
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    text, tower = sizes(*VICUNA[size]), sizes(*CLIP)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=side, patch_size=PATCH, projection_dim=16, **tower),
        text_config=LlamaConfig(
            **{**tiny_models.text_config(len(tokenizer)), "num_key_value_heads": text["num_attention_heads"], **text}
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(pixels // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    return tiny_models._save(LlavaForConditionalGeneration(config), processor, folder)


def onevision(folder: Path) -> Path:
    """LLaVA-OneVision-0.5B: SigLIP-so400m at 384 pixels (729 patches), Qwen2-0.5B, ChatML."""
    side = 384 // 14 * PATCH
    tokenizer = tiny_models.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>", "<|im_start|>"]})
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = None
    grid = [[rows * side, columns * side] for rows in range(1, 7) for columns in range(1, 7)]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=grid),
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": side, "width": side}),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=OTHER_START,
    )
    # Real: tower 27 layers, 1152 wide, 16 heads, 4304 inside; Qwen2-0.5B 24, 896, 14 (2 for keys and values), 4864.
    tower, text = sizes(3, 72, 9, 269), sizes(3, 56, 7, 304)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=side, patch_size=PATCH, vision_use_head=False, **tower),
        text_config=Qwen2Config(
            **{
                **tiny_models.text_config(len(tokenizer)),
                **text,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
            }
            | {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 8192}
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return tiny_models._save(LlavaOnevisionForConditionalGeneration(config), processor, folder)
