"""A folder with a tiny random model of each family, with the processor that the family has on the Hub.

Weights and sizes are small; classes, tokens, files, templates and settings that matter are those of the checkpoints:
Gemma's sliding windows and soft caps, Qwen's M-RoPE and padded vocabulary, tiles where the family cuts images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import tiny_templates
import torch
from tiny_models import (
    CORPUS,
    sentencepiece_tokenizer,
    text_config,
    tiny_llava,
    tiny_llava_next,
    tiny_llava_onevision,
    vision_config,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    SmolVLMVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

TILE, PATCH = 32, 8
TILES_OF_IDEFICS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bytes_tokenizer(
    specials: Sequence[str], *, eos: str, pad: str, bos: str | None = None, vocab_size: int = 600, **more: object
) -> PreTrainedTokenizerFast:
    """A GPT-2-style tokenizer: bytes, no normalizer, the special tokens last; `bos`, if given, begins every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials), initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        model_max_length=2048,
        **more,
    )


def ids_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The special tokens as a language model's config names them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def padded(tokenizer: PreTrainedTokenizerFast) -> int:
    """More embeddings than tokens, as Qwen and Gemma have them."""
    return -(-(len(tokenizer) + 1) // 64) * 64


def save(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    folder: str | Path,
    stops: Sequence[str] = (),
) -> Path:
    """Draw the model, and write it with its processor; `stops` end a generation beside the tokenizer's own."""
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projector: no image would get through
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = processor.tokenizer
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(stops))]
    for name, value in {**ids_of(tokenizer), "eos_token_id": ends if stops else ends[0]}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def siglip_config() -> dict:
    """A SigLIP tower on one tile, of 16 patches."""
    sizes = {key: value for key, value in vision_config().items() if key != "projection_dim"}
    return {**sizes, "image_size": TILE, "patch_size": PATCH, "initializer_range": 0.1}


# --- LLaVA with a Pixtral tower ----------------------------------------------------------------------------------


def pixtral(folder: str | Path) -> Path:
    """mistral-community/pixtral-12b: images of any size, a row of patches ends with `[IMG_BREAK]`."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = bytes_tokenizer(specials, bos="<s>", eos="</s>", pad="<pad>", unk_token="<unk>")
    processor = PixtralProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": PATCH, "width": PATCH}),
        tokenizer,
        patch_size=PATCH,
        chat_template=tiny_templates.PIXTRAL,
    )
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=PATCH,
            initializer_range=0.1,
        ),
        text_config=MistralConfig(
            **{**text_config(len(tokenizer)), **ids_of(tokenizer)}, head_dim=8, sliding_window=None
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return save(LlavaForConditionalGeneration, config, processor, folder)


# --- Qwen-VL -----------------------------------------------------------------------------------------------------

QWEN_TOKENS = [
    *CHATML_TOKENS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SIZES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """No token in front of a text; `<|im_end|>` ends a turn."""
    return bytes_tokenizer(QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>")


def qwen_image_processor() -> Qwen2VLImageProcessorPil:
    """One image token for 8 x 8 pixels, between 4 and 24 of them."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 64, "longest_edge": 24 * 64}, **QWEN_SIZES)


def qwen_config(tokenizer: PreTrainedTokenizerFast, text: dict, vision: dict, **rope: object) -> dict:
    """What the configs of the three Qwen-VL have in common."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 1, 1], **rope}
    sizes = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "text_config": {**text_config(padded(tokenizer)), **ids_of(tokenizer), "rope_parameters": rope, **text},
        "vision_config": {**sizes, "hidden_size": 32, "initializer_range": 0.1, **vision},
        "tie_word_embeddings": False,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def qwen2_vl(folder: str | Path) -> Path:
    """Qwen/Qwen2-VL-7B-Instruct: flattened patches with `image_grid_thw`, M-RoPE."""
    tokenizer = qwen_tokenizer()
    processor = Qwen2VLProcessor(
        qwen_image_processor(),
        tokenizer,
        Qwen2VLVideoProcessor(size={"shortest_edge": 4 * 64, "longest_edge": 24 * 64}, **QWEN_SIZES),
        chat_template=tiny_templates.chatml(QWEN_IMAGE, system="You are a helpful assistant."),
    )
    config = Qwen2VLConfig(**qwen_config(tokenizer, {}, {"embed_dim": 32, "mlp_ratio": 2}))
    return save(Qwen2VLForConditionalGeneration, config, processor, folder, ["<|endoftext|>"])


def qwen2_5_vl(folder: str | Path) -> Path:
    """Qwen/Qwen2.5-VL-3B-Instruct: as Qwen2-VL, with a tower that looks through windows (of 2 x 2 tokens)."""
    tokenizer = qwen_tokenizer()
    processor = Qwen2_5_VLProcessor(
        qwen_image_processor(),
        tokenizer,
        Qwen2VLVideoProcessor(size={"shortest_edge": 4 * 64, "longest_edge": 24 * 64}, **QWEN_SIZES),
        chat_template=tiny_templates.chatml(QWEN_IMAGE, system="You are a helpful assistant."),
    )
    vision = {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(**qwen_config(tokenizer, {}, vision))
    return save(Qwen2_5_VLForConditionalGeneration, config, processor, folder, ["<|endoftext|>"])


def qwen3_vl(folder: str | Path) -> Path:
    """Qwen/Qwen3-VL-4B-Instruct: interleaved M-RoPE, and features of the tower's first layer in the language model."""
    tokenizer = qwen_tokenizer()
    processor = Qwen3VLProcessor(
        qwen_image_processor(),
        tokenizer,
        Qwen3VLVideoProcessor(size={"shortest_edge": 4 * 64, "longest_edge": 24 * 64}, **QWEN_SIZES),
        chat_template=tiny_templates.chatml(QWEN_IMAGE),
    )
    vision = {
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(**qwen_config(tokenizer, {"head_dim": 8}, vision, mrope_interleaved=True))
    return save(Qwen3VLForConditionalGeneration, config, processor, folder, ["<|endoftext|>"])


# --- InternVL ----------------------------------------------------------------------------------------------------


def internvl(folder: str | Path) -> Path:
    """OpenGVLab/InternVL3-1B-hf: up to 4 tiles of 4 tokens, and a small picture of the whole if there are several."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = bytes_tokenizer(
        [*CHATML_TOKENS, *named.values()], eos="<|im_end|>", pad="<|endoftext|>", extra_special_tokens=named
    )
    sizes = {"size": {"height": TILE, "width": TILE}}
    processor = InternVLProcessor(
        GotOcr2ImageProcessorPil(**sizes, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(**sizes),
        image_seq_length=4,
        chat_template=tiny_templates.chatml("<IMG_CONTEXT>\\n"),
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
            initializer_range=0.1,
        ),
        text_config=Qwen2Config(**{**text_config(len(tokenizer)), **ids_of(tokenizer)}),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return save(InternVLForConditionalGeneration, config, processor, folder)


# --- SmolVLM, Idefics3 -------------------------------------------------------------------------------------------

IDEFICS_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES_OF_IDEFICS]
IDEFICS_SIZES = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}


def smolvlm(folder: str | Path) -> Path:
    """HuggingFaceTB/SmolVLM2-500M-Video-Instruct: every image in tiles of 4 tokens and once as a whole."""
    tokenizer = bytes_tokenizer(
        [*CHATML_TOKENS, *IDEFICS_TOKENS], eos="<end_of_utterance>", pad="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.bos_token = "<|im_start|>"  # which the template writes, and the tokenizer does not
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(**IDEFICS_SIZES),
        tokenizer,
        SmolVLMVideoProcessor(
            size={"longest_edge": TILE},
            max_image_size={"longest_edge": TILE},
            num_frames=4,
            fps=1,
            return_metadata=True,
        ),
        image_seq_len=4,
        chat_template=tiny_templates.utterances("<|im_start|>"),
    )
    config = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**siglip_config()),
        text_config=LlamaConfig(**{**text_config(len(tokenizer)), **ids_of(tokenizer)}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return save(SmolVLMForConditionalGeneration, config, processor, folder)


def idefics3(folder: str | Path) -> Path:
    """HuggingFaceM4/Idefics3-8B-Llama3: as SmolVLM, with a Llama-3 tokenizer, which begins every text."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", *IDEFICS_TOKENS]
    tokenizer = bytes_tokenizer(
        specials, bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|reserved_special_token_0|>"
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**IDEFICS_SIZES),
        tokenizer,
        image_seq_len=4,
        chat_template=tiny_templates.utterances("<|begin_of_text|>"),
    )
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**siglip_config()),
        text_config=LlamaConfig(**{**text_config(len(tokenizer)), **ids_of(tokenizer)}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return save(Idefics3ForConditionalGeneration, config, processor, folder, ["<end_of_utterance>"])


# --- Gemma 3, PaliGemma 2 ----------------------------------------------------------------------------------------


def gemma_tokenizer(more: Sequence[str], **named: object) -> PreTrainedTokenizerFast:
    """`<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3; `<bos>` begins every text, no space is put in front of it."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *more]
    return sentencepiece_tokenizer(
        specials, 600, bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>", prefix_space=False, **named
    )


def gemma_text(tokenizer: PreTrainedTokenizerFast) -> dict:
    """A layer that looks 16 tokens back and one that sees all; as many embeddings as fit a round number."""
    return {
        **text_config(padded(tokenizer)),
        **ids_of(tokenizer),
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    }


def gemma3(folder: str | Path) -> Path:
    """google/gemma-3-4b-it: 4 image tokens that see each other, between `<start_of_image>` and `<end_of_image>`."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = gemma_tokenizer([*turns, *named.values()], extra_special_tokens=named)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in turns])
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE}),
        tokenizer,
        image_seq_length=4,
        chat_template=tiny_templates.GEMMA,
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**siglip_config(), vision_use_head=False),
        text_config=Gemma3TextConfig(
            **gemma_text(tokenizer), rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=1000000.0
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        initializer_range=0.1,
    )
    return save(Gemma3ForConditionalGeneration, config, processor, folder, ["<end_of_turn>"])


def paligemma2(folder: str | Path) -> Path:
    """google/paligemma2-3b-mix-224: 16 image tokens, a prompt that sees itself whole, and no chat template."""
    tokenizer = gemma_tokenizer(["<image>"])
    image_processor = SiglipImageProcessorPil(size={"height": TILE, "width": TILE}, image_seq_length=16)
    processor = PaliGemmaProcessor(image_processor, tokenizer)  # adds `<loc0000>` and the like, which are no specials
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**siglip_config(), vision_use_head=False),
        text_config=Gemma2Config(**gemma_text(tokenizer), attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=padded(tokenizer),
    )
    return save(PaliGemmaForConditionalGeneration, config, processor, folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "pixtral": pixtral,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "paligemma2": paligemma2,
}
