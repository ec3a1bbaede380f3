"""Image features: what vision tower and projector make of a step's images, computed once for all of its passes.

They are made without autocast, in the dtype of the model, and kept on the CPU until a pass needs them.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from trl_llava.models.adapter_role import AdapterRole, computing, host_of
from trl_llava.models.base_model import backbone_of
from trl_llava.models.families import GRID, family_of
from trl_llava.models.model_inputs import FeatureForm, ImageFeatures, ModelInputs
from trl_llava.models.vision_tower import is_vision, takes_image_features


def encode_images(model: nn.Module, inputs: ModelInputs, batch_size: int) -> ModelInputs:
    """The inputs with features of their images in place of the pixels, made from `batch_size` rows at a time.

    `model` is an image-text model with a language-modelling or a score head, a PEFT model around one, or a role;
    unwrapped. The inputs stay as they are if there is no image, if the family takes no features, or if tower or
    projector are trained: every pass of the update must then run them to reach their gradients.
    """
    with computing(model) as base, torch.no_grad():
        backbone = backbone_of(base)
        if family_of(backbone.config) is None or not takes_image_features(backbone):
            return inputs
        if "pixel_values" not in inputs.images:
            return inputs
        if any(parameter.requires_grad for _, parameter in _vision_parameters(model)):
            return inputs
        replaced = inspect.signature(backbone.get_image_features).parameters.keys() & inputs.images.keys()
        features = ImageFeatures([], "list")
        for start in range(0, len(inputs), batch_size):
            part = inputs.select(range(start, min(start + batch_size, len(inputs))))
            found = _features(backbone, part, replaced, base.dtype)
            features = ImageFeatures(features.rows + found.rows, found.form if any(found.rows) else features.form)
    images = {name: entries for name, entries in inputs.images.items() if name not in replaced - {GRID}}
    return replace(inputs, images=images, features=features)


def _features(backbone: nn.Module, inputs: ModelInputs, taken: set[str], dtype: torch.dtype) -> ImageFeatures:
    """The features of the images of some rows, on the CPU, each row's on their own."""
    images = {name: value for name, value in inputs.image_tensors().items() if name in taken}
    if not images:
        return ImageFeatures([[] for _ in range(len(inputs))], "list")
    device = inputs.input_ids.device
    given = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in images.items()
    }
    with torch.autocast(device.type, enabled=False):
        output = backbone.get_image_features(**given, return_dict=True)
    found, form = _entries(output)
    counts = [len(entries) for entries in inputs.images[GRID if GRID in inputs.images else "pixel_values"]]
    if sum(counts) != len(found):
        raise RuntimeError(f"{type(backbone).__name__} made {len(found)} features of {sum(counts)} images")
    entries = iter(_on_the_cpu(found))
    return ImageFeatures([[next(entries) for _ in range(count)] for count in counts], form)


def _on_the_cpu(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """The features as parts of one block; pinned if they come from a GPU, which each pass then copies them back to."""
    block = torch.cat([feature.flatten() for feature in features])
    # One block, since the allocator of pinned memory rounds each one up to a power of two.
    block = block.cpu().pin_memory() if block.is_cuda else block.cpu()
    parts = block.split([feature.numel() for feature in features])
    return [part.view(feature.shape) for part, feature in zip(parts, features, strict=True)]


def _entries(output: Any) -> tuple[list[torch.Tensor], FeatureForm]:
    """The features of each image or tile, out of what `get_image_features` returned, and how they were returned."""
    deeper = getattr(output, "deepstack_features", None)
    if deeper is not None:
        return [torch.stack(layers) for layers in zip(output.pooler_output, *deeper, strict=True)], "deepstack"
    return list(output.pooler_output), "stacked" if isinstance(output.pooler_output, torch.Tensor) else "list"


def same_vision(first: nn.Module, second: nn.Module) -> bool:
    """Whether two roles make the same features of an image: adapters on one base, none on tower or projector."""
    return host_of(first) is host_of(second) and not any(
        _adapter(role) in name.split(".") for role in (first, second) for name, _ in _vision_parameters(role)
    )


def _vision_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Tower's and projector's parameters that a role computes with: not those of other adapters on its base."""
    host = host_of(model)
    others = set(host.peft_config) - {_adapter(model)} if isinstance(host, PeftModel) else set()
    return [
        (name, parameter)
        for name, parameter in host.named_parameters()
        if is_vision(name) and not others & set(name.split("."))
    ]


def _adapter(model: nn.Module) -> str | None:
    if isinstance(model, AdapterRole):
        return model.adapter_name
    return str(model.active_adapter) if isinstance(model, PeftModel) else None
