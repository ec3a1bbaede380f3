"""A process whose batch has no picture looks at a blank one, so that every process runs the same layers.

Where weights are spread over processes (ZeRO-3, FSDP), all of them fetch a layer together: one that skips the tower
waits for ever, or takes the tower's weights for others. Where tower or projector are trained, all processes run them,
so that DDP has not to find out in each pass which gradients there will be.
"""

import inspect
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.errors import ExplainedError
from trl_llava.models.base_model import base_of
from trl_llava.models.shared_weights import shares_weights
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES


class NoBlankPictureError(ExplainedError, ValueError):
    """A batch without pictures in a run that needs one on every process, and a model that cannot take a blank one."""


def look_on_every_process(
    model: nn.Module,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    encoded_before: bool = False,
) -> bool:
    """Let passes without a picture run tower and projector on a blank one, where that is needed.

    The features are multiplied by 0 and added to what the language model reads, so they change neither result nor
    gradients.

    Args:
        model: the model that will be prepared, with or without PEFT around it.
        processor: its processor; a tokenizer, for text-only models, has no pictures to offer.
        accelerator: knows how many processes there are and what they share.
        encoded_before: whether pictures are encoded ahead of the passes while both parts are frozen, as in PPO.

    Returns:
        `True` if such passes now look at a blank picture.
    """
    base = base_of(model)
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), base)
    image_processor = getattr(processor, "image_processor", None)
    if accelerator.num_processes == 1 or image_processor is None or not hasattr(backbone, "get_image_features"):
        return False
    in_the_pass = not (encoded_before and takes_encoded_images(backbone))
    if not sees_with_trained_parts(base) and not (shares_weights(accelerator) and in_the_pass):
        return False
    blank = image_processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt")
    taken = inspect.signature(backbone.get_image_features).parameters
    _Look(backbone, {name: value for name, value in blank.items() if name in taken})
    return True


def takes_encoded_images(backbone: nn.Module) -> bool:
    """Whether a model's forward takes image features in place of pixels.

    Args:
        backbone: a headless image-text model.

    Returns:
        `True` if it does.
    """
    return "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters


def sees_with_trained_parts(model: nn.Module) -> bool:
    """Whether gradients reach the vision tower or the projector.

    Args:
        model: an image-text model.

    Returns:
        `True` if one of their parameters is trained.
    """
    seeing = {*TOWER_NAMES, *PROJECTOR_NAMES}
    return any(p.requires_grad and seeing & set(name.split(".")) for name, p in model.named_parameters())


class _Look:
    """The hooks of a pass: tower and projector first, whoever has pictures, then the language model."""

    def __init__(self, backbone: nn.Module, blank: dict[str, torch.Tensor]) -> None:
        self.blank = blank
        self.taken = set(inspect.signature(backbone.get_image_features).parameters)
        self.can = takes_encoded_images(backbone)
        self.nothing: torch.Tensor | None = None
        backbone.register_forward_pre_hook(self.before, with_kwargs=True)
        if (language_model := getattr(backbone, "language_model", None)) is not None:
            language_model.register_forward_pre_hook(self.into_embeddings, with_kwargs=True)
        backbone.register_forward_hook(self.after)

    def before(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # Encoded already, before this pass; or a pass of `generate`, which has all weights.
        if kwargs.get("mm_encoder_outputs") is not None or kwargs.get("past_key_values") is not None:
            return None
        given = {name: kwargs.get(name) for name in self.taken if kwargs.get(name) is not None}
        if "pixel_values" not in given:
            if not self.can:
                raise NoBlankPictureError(
                    f"a batch of one process has no picture, and {type(backbone).__name__} cannot run its vision "
                    "tower without using what it sees, which ZeRO-3, FSDP and a trained projector need on every "
                    "process. Leave out rows without pictures, or use ddp or zero2 with a frozen tower and projector"
                )
            device = next(value for value in kwargs.values() if isinstance(value, torch.Tensor)).device
            blank = {name: value.to(device) for name, value in self.blank.items()}
            seen = backbone.get_image_features(**blank, return_dict=True).pooler_output
            self.nothing = sum(((features * 0).sum() for features in seen), torch.zeros((), device=device))
            return None
        if not self.can:
            return None
        encoded = backbone.get_image_features(**given, return_dict=True)
        left = {name: value for name, value in kwargs.items() if name not in given}
        return args, {**left, "mm_encoder_outputs": {"image": encoded}}

    def into_embeddings(
        self, language_model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        # Where pictures enter too: FSDP shares out a layer's gradients when those of its input are there, so that with
        # a trained projector the first layer would come in another order on a process that has none.
        embeddings, nothing = kwargs.get("inputs_embeds"), self.nothing
        if embeddings is None or nothing is None:
            return None
        self.nothing = None
        return args, {**kwargs, "inputs_embeds": embeddings + nothing.to(embeddings.dtype)}

    def after(self, backbone: nn.Module, args: tuple, output: Any) -> Any:
        if self.nothing is not None:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden + self.nothing.to(hidden.dtype)
            self.nothing = None
        return output
