"""Models without weights, on the meta device: every module, parameter and dtype of the real one, by its config."""

import copy
import math
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.models.adapters import lora_config
from trl_llava.models.load import HEAD
from trl_llava.models.quantization import UNQUANTIZED
from trl_llava.models.vision_tower import freeze_vision

BLOCK_4BIT = 64
"""Numbers that share one scale in bitsandbytes' 4-bit formats."""


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight takes the bytes of bitsandbytes' 4 or 8 bits, and is unpacked whenever it is used.

    4 bits: half a byte a number, and one scale per 64 numbers: 4 bytes, or with double quantisation 1 byte and 4 more
    per 256 scales. 8 bits: a byte a number, and 4 bytes per row.
    """

    def __init__(self, layer: nn.Linear, model_args: LlavaModelConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.compute_dtype = layer.weight.dtype
        numbers = layer.weight.numel()
        packed, scales = numbers, 4 * layer.out_features
        if model_args.load_in_4bit:
            packed, blocks = math.ceil(numbers / 2), math.ceil(numbers / BLOCK_4BIT)
            scales = blocks + 4 * math.ceil(blocks / 256) if model_args.use_bnb_nested_quant else 4 * blocks
        self.weight = nn.Parameter(torch.empty(packed, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., out_features) of (..., in_features), in the input's dtype; holds the same tensors as the real one."""
        output = _Unpacked.apply(input.to(self.compute_dtype), self.out_features)
        return (output if self.bias is None else output + self.bias).to(input.dtype)


class _Unpacked(torch.autograd.Function):
    """A product with a weight that exists only while it runs, forwards and backwards; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.in_features = input.shape[-1]
        return input @ input.new_empty(ctx.in_features, out_features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ gradient.new_empty(gradient.shape[-1], ctx.in_features), None


def build_policy(config: PreTrainedConfig, model_args: LlavaModelConfig) -> PreTrainedModel:
    """The image-text model of a config, as `models.load_policy` would load it."""
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise InputError(f"model_name_or_path is a {config.model_type} model, which does not take images")
    return _build(AutoModelForImageTextToText, config, model_args)


def build_classifier(config: PreTrainedConfig, model_args: LlavaModelConfig) -> PreTrainedModel:
    """The model with a score head and one label, as `models.load_sequence_classifier` would load it."""
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise InputError(f"a {config.model_type} model has no score head: reward and value models are LLaVA models")
    config.num_labels = 1
    return _build(AutoModelForSequenceClassification, config, model_args)


def _build(auto_class: type, config: PreTrainedConfig, model_args: LlavaModelConfig) -> PreTrainedModel:
    dtype = model_args.dtype
    wanted = getattr(torch, dtype) if dtype not in (None, "auto") else config.dtype or torch.float32
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    with torch.device("meta"), no_init_weights():
        model = auto_class.from_config(config, dtype=wanted, **attention)  # type: ignore[attr-defined]
        model.tie_weights()  # without initialisation nothing has: a head would be counted beside its embeddings
        if model_args.load_in_4bit or model_args.load_in_8bit:
            _quantize(model, model_args)
    freeze_vision(model, tower=model_args.freeze_vision_tower, projector=model_args.freeze_projector)
    return model


def _quantize(model: PreTrainedModel, model_args: LlavaModelConfig) -> None:
    """Put `QuantizedLinear` in place of the layers that bitsandbytes would replace; all else is frozen too."""
    kept = {pattern.rpartition("?")[2] for pattern in UNQUANTIZED}
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            path = {*name.split("."), child}
            if isinstance(layer, nn.Linear) and not path & kept:
                setattr(module, child, QuantizedLinear(layer, model_args))
    for name, parameter in model.named_parameters():
        if HEAD not in name.split("."):
            parameter.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = model_args.load_in_4bit, model_args.load_in_8bit  # TRL asks


def add_adapter(
    model: PreTrainedModel,
    model_args: LlavaModelConfig,
    *,
    task: str,
    trained: PeftConfig | None = None,
    frozen_copy: bool = False,
) -> PreTrainedModel | PeftModel:
    """Put the adapter that is `trained` already, or a fresh one if the recipe has one, on a meta model.

    `task` is CAUSAL_LM, or SEQ_CLS for models with a score head. `frozen_copy` adds a second one, "reference".
    """
    config = trained if isinstance(trained, LoraConfig) else lora_config(model_args, model, task=task)  # type: ignore[arg-type]
    if config is None:
        return model
    config.inference_mode = False
    if task == "SEQ_CLS" and HEAD not in (config.modules_to_save or []):
        config.modules_to_save = [*(config.modules_to_save or []), HEAD]
    with torch.device("meta"):
        peft_model = get_peft_model(model, config)
        if frozen_copy:
            peft_model.add_adapter("reference", config)
    for name, parameter in peft_model.named_parameters():
        if ".reference." in name:
            parameter.requires_grad_(False)
    return peft_model


def shaped(args: LlavaModelConfig, shape: LlavaModelConfig | None) -> LlavaModelConfig:
    """Model fields with the `lora_*` of another recipe; None leaves them as they are."""
    if shape is None:
        return args
    changed = copy.copy(args)
    for name in vars(shape):
        if name.startswith(("lora_", "use_peft", "use_dora", "use_rslora")):
            setattr(changed, name, getattr(shape, name))
    return changed
