"""Models of a stated size with random weights, and rows whose tokens can be counted: one word is one token.

Everything is written to a folder, so that both sides of a measurement load the same weights and rows.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from trl_llava.models.load import load_processor
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE
from trl_llava.rewards.factual_reward import FactualReward

PATCH = 14
STOP = "</s>"
SPECIAL = ["<unk>", "<s>", STOP, "<pad>", "<image>"]
LAYERS = r"(.*language_model\.|model\.|.*\.model\.)layers\..*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Size:
    """A LLaVA and what it is asked.

    Attributes:
        vocabulary: tokens; LLaVA-1.5 has 32,064.
        hidden: width of the language model.
        layers: its layers.
        heads: its attention heads.
        tower_hidden: width of the vision tower.
        tower_layers: its layers.
        image_tokens: a square number: tokens of a picture.
        question: tokens of a question, without the template's.
        rank: of the LoRA adapters.
    """

    vocabulary: int = 32_000
    hidden: int = 256
    layers: int = 10
    heads: int = 4
    tower_hidden: int = 128
    tower_layers: int = 5
    image_tokens: int = 576
    question: int = 24
    rank: int = 16

    @property
    def intermediate(self) -> int:
        """Width of the MLP, in Llama's proportion to `hidden`."""
        return round(self.hidden * 11008 / 4096 / 16) * 16

    @property
    def image_size(self) -> int:
        """Pixels of a side of a picture."""
        return PATCH * round(self.image_tokens**0.5)


FULL = Size()
"""What dominates a step on two cores: 576 image tokens and 25M parameters, with a vocabulary of LLaVA's size."""
TOY = Size(vocabulary=300, hidden=32, layers=2, heads=4, tower_hidden=32, tower_layers=2, image_tokens=16, question=6)
"""For tests: what runs is the same, what it takes is nothing."""


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are `w0`, `w1`, ...; the template's own words are unknown to it, one token each.

    Args:
        vocabulary: Number of tokens.

    Returns:
        The tokenizer.
    """
    tokens = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=STOP,
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1 << 20,
    )
    tokenizer.chat_template = VICUNA_V1_CHAT_TEMPLATE
    return tokenizer


def text_config(size: Size) -> LlamaConfig:
    """The language model.

    Args:
        size: What it is.

    Returns:
        Its config.
    """
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )


def make_base(size: Size, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Path:
    """Write a LLaVA with its processor.

    Args:
        size: What it is.
        folder: Where it goes.
        dtype: Of the weights.
        device: Where they are drawn.

    Returns:
        The folder.
    """
    side = {"height": size.image_size, "width": size.image_size}
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": size.image_size}, crop_size=side),
        make_tokenizer(size.vocabulary),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_V1_CHAT_TEMPLATE,
    )
    tower = CLIPVisionConfig(
        image_size=size.image_size,
        patch_size=PATCH,
        hidden_size=size.tower_hidden,
        intermediate_size=4 * size.tower_hidden,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=max(1, size.tower_hidden // 64),
        projection_dim=size.tower_hidden,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text_config(size),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=size.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForImageTextToText.from_config(config, dtype=dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_text_model(size: Size, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Path:
    """Write the language model alone, for a trainer that cannot see.

    Args:
        size: What it is.
        folder: Where it goes.
        dtype: Of the weights.
        device: Where they are drawn.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(text_config(size), dtype=dtype).save_pretrained(folder)
    make_tokenizer(size.vocabulary).save_pretrained(folder)
    return folder


def lora(size: Size, *, head: bool = False) -> LoraConfig:
    """An adapter on every linear layer of the language model, on both sides of a measurement.

    Args:
        size: Its rank.
        head: The model has a score head, which is trained whole.

    Returns:
        PEFT's config.
    """
    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if head else {"task_type": "CAUSAL_LM"}
    return LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=LAYERS, **kind)


def make_reward(
    base: Path,
    size: Size,
    folder: Path,
    *,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write a reward model's adapter and head, as stage 2 does; it scores where the answer ends.

    Args:
        base: The base model.
        size: What it is.
        folder: Where it goes.
        whole: Write a whole model instead of an adapter.
        dtype: Of the base.
        device: Where the base is loaded.

    Returns:
        The folder.
    """
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype).to(device)
    if not whole:
        model = get_peft_model(model, lora(size, head=True))
    FactualReward(model, load_processor(str(base)), None).save_pretrained(folder)
    return folder


def describe(size: Size, base: Path) -> str:
    """What was measured, for the head of a table.

    Args:
        size: The size.
        base: The base model.

    Returns:
        One line.
    """
    model = AutoModelForImageTextToText.from_pretrained(base)
    parts = {"in all": model, "tower": model.model.vision_tower, "head": model.lm_head}
    counts = ", ".join(
        f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f}M {name}" for name, part in parts.items()
    )
    return f"Model: {counts}; {', '.join(f'{key} {value}' for key, value in asdict(size).items())}."
