"""Who makes the positions of tokens: the model, of its images, or whoever runs it, by counting real tokens."""

import torch
from torch import nn

from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.families import GRID, family_of
from trl_llava.models.model_inputs import ModelInputs


def derives_positions(model: nn.Module) -> bool:
    """Whether a model makes multimodal positions of its own from the attention mask, instead of plain ones."""
    return any(hasattr(part, "get_rope_index") for part in (base_of(model), backbone_of(model)))


def position_kwargs(model: nn.Module, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B, L) position ids that count the real tokens of a (B, L) mask; nothing for a model that derives its own."""
    if derives_positions(model):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0) + _first_position(model)}


def prompt_positions(model: nn.Module, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of (B, Q) prompts, and (B, 1) that of each one's next token, which is text.

    The ids are (3, B, Q) for a model that derives its own (time, height and width), else (B, Q).
    """
    mask = inputs.attention_mask
    after = mask.sum(1, keepdim=True)
    if not derives_positions(model):
        positions = position_kwargs(model, mask)["position_ids"]
        return positions, after + _first_position(model)
    grids = inputs.image_tensors().get(GRID)
    positions, deltas = backbone_of(model).get_rope_index(
        input_ids=inputs.input_ids,
        image_grid_thw=None if grids is None else grids.to(mask.device),
        attention_mask=mask,
        **inputs.tokens,
    )
    return positions, after + deltas


def _first_position(model: nn.Module) -> int:
    family = family_of(backbone_of(model).config)
    return 0 if family is None else family.first_position
