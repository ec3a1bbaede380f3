"""Folders with models small enough for unit tests: LLaVA, LLaVA-NeXT, LLaVA-OneVision and a text-only Llama.

The weights are random, but everything around them is shaped like the checkpoints on the Hub: a Llama-style tokenizer
(`▁` in front of every chunk of text, byte fallback, one BOS), the image processors' own resizing, `<image>` expanded
by the processor, and the vicuna_v1 chat template.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

IMAGE_SIZE = 28
PATCH_SIZE = 7
GRID_PINPOINTS = [[28, 56], [56, 28], [56, 56]]

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT:",
    "Please evaluate the quality of your last response. There are several dimensions you should consider in your "
    "evaluation: Accurate: The AI should provide factual and accurate information from the image, and refrain from "
    "making statements that are not supported by the image or inconsistent with the image. Specifically, the AI's "
    "response should be fully supported by the combination of the following captions:",
    "Helpful: The AI’s response should precisely serve the user's needs and interests, while grounding the response "  # noqa: RUF001
    "in the image. Language Natural: The AI should employ language that flows smoothly and is free from repetitive or "
    "awkward constructs. Concise: The AI should efficiently address the task or answer the question, communicating "
    "the necessary information with brevity and clarity.",
    "A good response should be accurate, helpful, language natural, and concise. Following your definitions, the "
    "quality score of my last response is",
    "What is in the picture? Describe it. Is there a red square? Yes, there is a red square. No, there is a blue "
    "circle and a green triangle. The correct option is A. The correct option is B.",
]


def chat_template() -> str:
    """The vicuna_v1 template without the judging turn."""
    return (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] }}"
        "{% elif m['role'] == 'user' %}{{ ' ' if loop.index0 == 1 else '' }}USER: "
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% else %}{{ ' ASSISTANT: ' }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ '</s>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )


def tiny_tokenizer(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A Llama-style tokenizer: `<unk>` 0, `<s>` 1, `</s>` 2, `<pad>` 3, `<image>` 4, 256 bytes, then merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 256 - len(specials), show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    merges = [tuple(merge) for merge in learned["merges"]]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "<video>"],
        padding_side="left",
        model_max_length=2048,
    )
    fast.chat_template = chat_template()
    return fast


def text_config(vocab_size: int) -> dict:
    """Sizes shared by the language models."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,  # with the usual 0.02 every token gets the same logits and tests see nothing
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    }


def vision_config() -> dict:
    """Sizes shared by the vision towers."""
    return {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    }


def tiny_llava(folder: str | Path, *, seed: int = 0, vocab_size: int = 600) -> Path:
    """LLaVA-1.5: CLIP tower, patch features only, 16 image tokens."""
    tokenizer = tiny_tokenizer(vocab_size)
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_config()),
        text_config=LlamaConfig(**text_config(len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    return _save(LlavaForConditionalGeneration(config), processor, folder)


def tiny_llava_next(folder: str | Path, *, seed: int = 0, vocab_size: int = 600) -> Path:
    """LLaVA-NeXT: tiles of 28 pixels, a new-line embedding, `image_sizes` beside `pixel_values`."""
    tokenizer = tiny_tokenizer(vocab_size)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=GRID_PINPOINTS,
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision_config()),
        text_config=LlamaConfig(**text_config(len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRID_PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    return _save(LlavaNextForConditionalGeneration(config), processor, folder)


def tiny_llava_onevision(folder: str | Path, *, seed: int = 0, vocab_size: int = 600) -> Path:
    """LLaVA-OneVision: SigLIP tower without CLS, Qwen2, `batch_num_images`.

    `AutoProcessor` reads this folder only where torchvision is installed (its video part needs it): tests take
    `onevision_processor()`.
    """
    processor = onevision_processor(vocab_size)
    tokenizer = processor.tokenizer
    vision = {key: value for key, value in vision_config().items() if key != "projection_dim"}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Qwen2Config(**text_config(len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(seed)
    return _save(LlavaOnevisionForConditionalGeneration(config), processor, folder)


class ImageOnlyOnevisionProcessor(LlavaOnevisionProcessor):
    """The processor without its video part, which cannot be made without torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, num_image_tokens=None, chat_template=None):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = "full"
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
        self.vision_aspect_ratio = "anyres_max_9"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def onevision_processor(vocab_size: int = 600) -> ImageOnlyOnevisionProcessor:
    """The processor of `tiny_llava_onevision`."""
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_grid_pinpoints=GRID_PINPOINTS
    )
    return ImageOnlyOnevisionProcessor(
        image_processor,
        tiny_tokenizer(vocab_size),
        num_image_tokens=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        chat_template=chat_template(),
    )


def tiny_llama(folder: str | Path, *, seed: int = 0, vocab_size: int = 600) -> Path:
    """A text-only Llama with the same tokenizer."""
    tokenizer = tiny_tokenizer(vocab_size)
    torch.manual_seed(seed)
    return _save(AutoModelForCausalLM.from_config(LlamaConfig(**text_config(len(tokenizer)))), tokenizer, folder)


def _save(model: PreTrainedModel, processor: object, folder: str | Path) -> Path:
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def image(color: str = "red", size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A (width, height) picture of one colour with a white square in its top left corner."""
    picture = Image.new("RGB", size, color)
    picture.paste("white", (4, 4, 12, 12))
    return picture
