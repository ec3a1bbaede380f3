"""Image features: what vision tower and projector make of a step's images, computed once for all of its passes.

They are made without autocast, in the dtype of the model, and kept on the CPU until a pass needs them.
"""

import inspect
from dataclasses import replace

import torch
from peft import PeftModel
from torch import nn

from trl_llava.models.adapter_role import AdapterRole, computing, host_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.vision_tower import is_vision, takes_image_features


def encode_images(model: nn.Module, inputs: ModelInputs, batch_size: int) -> ModelInputs:
    """The inputs with features of their images in place of the pixels, made from `batch_size` rows at a time.

    `model` is a LLaVA with a language-modelling or a score head, a PEFT model around one, or a role; unwrapped. The
    inputs stay as they are if there is no image, if the model takes no features, or if its tower or projector are
    trained: every pass of the update must then run them to reach their gradients.
    """
    with computing(model) as base, torch.no_grad():
        backbone = getattr(base, base.base_model_prefix)
        if "pixel_values" not in inputs.extras or not takes_image_features(backbone):
            return inputs
        if any(parameter.requires_grad for _, parameter in _vision_parameters(model)):
            return inputs
        replaced = inspect.signature(backbone.get_image_features).parameters.keys() & inputs.extras.keys()
        device, features = inputs.input_ids.device, []
        for start in range(0, len(inputs), batch_size):
            images = inputs.images_of(range(start, min(start + batch_size, len(inputs))))
            if not images:
                continue
            given = {
                key: value.to(device, base.dtype if value.is_floating_point() else value.dtype)
                for key, value in images.items()
                if key in replaced
            }
            with torch.autocast(device.type, enabled=False):
                output = backbone.get_image_features(**given, return_dict=True).pooler_output
            features += [feature.cpu() for feature in output]
    extras = {key: value for key, value in inputs.extras.items() if key not in replaced}
    return replace(inputs, extras=extras, features=features)


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
