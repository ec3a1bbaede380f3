"""Put a LLaVA together from a vision tower and a language model."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_llava.errors import InputError, OccupiedError
from trl_llava.models.load import load_image_processor


def assemble_llava(
    vision_name_or_path: str,
    language_name_or_path: str,
    output_dir: str | Path,
    *,
    image_token: str = "<image>",
    vision_feature_layer: int = -2,
    select_strategy: Literal["default", "full"] | None = None,
    chat_template: str | None = None,
    projector_init: Literal["default", "whitened"] = "default",
    sample_images: Sequence[Image.Image] | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    vision_revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put a LLaVA together from a CLIP or SigLIP tower and a causal language model, with a new projector, and save it.

    The folder loads with `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained`. The
    projector is untrained: train it (`freeze_projector: false`) before use.

    Args:
        vision_name_or_path: Hub ID or folder of the tower, alone or within a whole CLIP or SigLIP model.
        language_name_or_path: Hub ID or folder of the causal language model with its tokenizer.
        output_dir: Where model and processor are saved; must be empty or absent.
        image_token: Added to tokenizer and embeddings where it is missing.
        vision_feature_layer: Which hidden state of the tower is used; -2 as in the paper.
        select_strategy: "default" drops the tower's class token, "full" keeps every position. None picks the one that
            fits: "default" for a tower with a class token (CLIP), "full" for one without (SigLIP).
        chat_template: Jinja template; None keeps the language model's own, which must then place images.
        projector_init: "default" draws both layers uniformly as `nn.Linear` does; "whitened" makes the first layer
            whiten the tower's features of `sample_images` and the second give them the size of word embeddings.
        sample_images: Images for "whitened"; at least as many patches as the features have dimensions.
        seed: Seed of the projector's weights.
        dtype: Of the weights; "auto" keeps the language model's.
        revision: Revision of the language model.
        vision_revision: Revision of the tower.
        trust_remote_code: Passed on to transformers.

    Returns:
        Model and processor as they were saved.

    Raises:
        FileExistsError: If `output_dir` is not empty.
        ValueError: If the tower is no vision tower, no chat template is at hand, the strategy does not fit the tower,
            or "whitened" comes without images.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise OccupiedError(f"{output_dir} is not empty. Choose another output_dir, or empty it yourself.")
    if projector_init == "whitened" and not sample_images:
        raise InputError('projector_init="whitened" needs sample_images: images whose features are whitened.')
    remote = {"trust_remote_code": trust_remote_code}
    language = AutoModelForCausalLM.from_pretrained(language_name_or_path, dtype=dtype, revision=revision, **remote)
    tokenizer = AutoTokenizer.from_pretrained(language_name_or_path, revision=revision, **remote)
    tower = _load_tower(vision_name_or_path, language.dtype, vision_revision, remote)
    image_processor = load_image_processor(vision_name_or_path, vision_revision, **remote)

    select_strategy = _strategy_that_fits(tower, select_strategy)
    _add_missing_tokens(language, tokenizer, image_token)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=select_strategy,
        chat_template=chat_template or tokenizer.chat_template,
        image_token=image_token,
        num_additional_image_tokens=int(_has_class_token(tower)),
    )
    if processor.chat_template is None:
        raise InputError(f"{language_name_or_path} has no chat template: pass chat_template.")

    model = _join(tower, language, tokenizer, image_token, vision_feature_layer, select_strategy)
    _init_projector(model.model.multi_modal_projector, seed)
    if projector_init == "whitened" and sample_images is not None:  # checked above
        _whiten_projector(model, processor, sample_images, seed)
    save_with_hub_names(model, output_dir)
    processor.save_pretrained(output_dir)
    return model, processor


def save_with_hub_names(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a LLaVA under the names that checkpoints on the Hub have, `vision_tower.vision_model.*`."""
    # transformers >= 5.6 has no module `vision_model` any more and saves names without it unless the model was loaded
    # from a file that has them; vLLM stops at such a file.
    state = {
        re.sub(r"(?<=vision_tower\.)(?!vision_model\.)", "vision_model.", name): tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=state)


def _has_class_token(tower: PreTrainedModel) -> bool:
    return hasattr(tower.embeddings, "class_embedding")


def _strategy_that_fits(
    tower: PreTrainedModel, wanted: Literal["default", "full"] | None
) -> Literal["default", "full"]:
    """The strategy that is wanted, or the one that drops the class token where there is one."""
    if wanted == "default" and not _has_class_token(tower):
        raise InputError(
            f'select_strategy="default" would drop the first patch of {type(tower).__name__}, '
            'which has no class token. Use select_strategy="full".'
        )
    return wanted or ("default" if _has_class_token(tower) else "full")


def _load_tower(name: str, dtype: torch.dtype, revision: str | None, remote: dict[str, bool]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name, revision=revision, **remote)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size") or type(config) not in MODEL_MAPPING:
        raise InputError(f"{name} holds a {type(config).__name__}; expected a CLIP or SigLIP vision tower.")
    tower_class = MODEL_MAPPING[type(config)]
    return tower_class.from_pretrained(name, config=config, dtype=dtype, revision=revision)


def _add_missing_tokens(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    old = language.get_input_embeddings().num_embeddings
    if len(tokenizer) > old:
        # The mean of the known rows: no random draw, and no huge logit for a token that nobody trained.
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
            layer.weight.data[old:] = layer.weight.data[:old].mean(dim=0)


def _join(
    tower: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    vision_feature_layer: int,
    select_strategy: str,
) -> LlavaForConditionalGeneration:
    image_tokens = (tower.config.image_size // tower.config.patch_size) ** 2
    image_tokens += int(select_strategy == "full" and _has_class_token(tower))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        image_seq_length=image_tokens,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=select_strategy,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    config.pad_token_id = tokenizer.pad_token_id
    # Built without memory, then given the loaded parts: a 13B model must not be drawn at random first.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector = model.model.multi_modal_projector.to_empty(device="cpu").to(language.dtype)
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.config.dtype = language.dtype
    model.generation_config = language.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


def _init_projector(projector: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in (projector.linear_1, projector.linear_2):
        bound = 1 / math.sqrt(layer.in_features)
        weight = torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=generator)
        layer.weight.data.copy_(weight)
        if layer.bias is not None:
            layer.bias.data.zero_()


@torch.no_grad()
def _whiten_projector(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Sequence[Image.Image], seed: int
) -> None:
    """Give the GELU independent inputs of unit scale, and the language model inputs of the size of its words."""
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"].to(model.dtype)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = hidden[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    features = features.reshape(-1, features.shape[-1]).double()
    projector = model.model.multi_modal_projector
    inputs, outputs = projector.linear_1.in_features, projector.linear_1.out_features
    if len(features) < inputs:
        raise InputError(
            f"{len(images)} sample images give {len(features)} patches, fewer than the {inputs} feature dimensions. "
            "Pass more sample_images."
        )
    mean = features.mean(dim=0)
    variance, axes = torch.linalg.eigh(torch.cov(features.T))
    # Directions that hardly vary would only blow up noise.
    rank = min(outputs, int((variance > 1e-6 * variance.max()).sum()))
    whiten = axes[:, -rank:] / variance[-rank:].sqrt()  # (inputs, rank)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(outputs, rank, generator=generator, dtype=torch.double)
    weight = mix / mix.norm(dim=1, keepdim=True) @ whiten.T
    projector.linear_1.weight.copy_(weight)
    if projector.linear_1.bias is not None:
        projector.linear_1.bias.copy_(-weight @ mean)
    out = projector(features.to(model.dtype)).float()
    words = model.get_input_embeddings().weight.float()
    projector.linear_2.weight.mul_((words.std() / out.std()).to(model.dtype))
