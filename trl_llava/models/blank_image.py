"""A process whose batch has no image encodes a blank one, so that every process runs the same layers.

Where weights are sharded over processes (ZeRO-3, FSDP), all of them gather a layer together: one that skips the tower
waits for ever, or takes the tower's weights for others. Where tower or projector are trained, all processes run them,
so that DDP need not find out in each pass which gradients there will be.
"""

import inspect
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.errors import ExplainedError
from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.families import GRID
from trl_llava.models.sharded_weights import shards_weights
from trl_llava.models.vision_tower import takes_image_features, trains_vision


class NoBlankImageError(ExplainedError, ValueError):
    """A batch without images in a run that needs one on every process, and a model that cannot use a blank one."""


def encode_on_every_process(
    model: nn.Module,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    encoded_before: bool = False,
) -> bool:
    """Let passes without an image run tower and projector on a blank one; returns `False` where that is not needed.

    The features are multiplied by 0 and added to what the language model reads, so they change neither result nor
    gradients. `encoded_before`: images are encoded ahead of the passes while both parts are frozen, as in PPO.
    """
    base = base_of(model)
    backbone = backbone_of(base)
    image_processor = getattr(processor, "image_processor", None)
    if accelerator.num_processes == 1 or image_processor is None or not hasattr(backbone, "get_image_features"):
        return False
    in_the_pass = not (encoded_before and takes_image_features(backbone))
    if not trains_vision(base) and not (shards_weights(accelerator) and in_the_pass):
        return False
    blank = image_processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt")
    taken = inspect.signature(backbone.get_image_features).parameters
    _BlankImage(backbone, {name: value for name, value in blank.items() if name in taken})
    return True


class _BlankImage:
    """The hooks of a pass: tower and projector run first on every process, then the language model."""

    def __init__(self, backbone: nn.Module, blank: dict[str, torch.Tensor]) -> None:
        self.blank = blank
        self.taken = set(inspect.signature(backbone.get_image_features).parameters)
        self.takes_features = takes_image_features(backbone)
        self.nothing: torch.Tensor | None = None
        backbone.register_forward_pre_hook(self.before, with_kwargs=True)
        if (language_model := backbone.get_decoder()) is not backbone:
            language_model.register_forward_pre_hook(self.into_embeddings, with_kwargs=True)
        backbone.register_forward_hook(self.after)

    def before(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # Encoded already, before this pass; or a pass of `generate`, which has all weights (transformers 5.24 renames
        # `past_key_values` to `cache`).
        if any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "past_key_values", "cache")):
            return None
        given = {name: kwargs[name] for name in self.taken if kwargs.get(name) is not None}
        if "pixel_values" not in given:
            if not self.takes_features:
                raise NoBlankImageError(
                    f"a batch of one process has no image, and {type(backbone).__name__} cannot run its vision tower "
                    "without using its features, which ZeRO-3, FSDP and a trained projector need on every process. "
                    "Leave out rows without images, or use ddp or zero2 with a frozen tower and projector"
                )
            device = next(value for value in kwargs.values() if isinstance(value, torch.Tensor)).device
            blank = {name: value.to(device) for name, value in self.blank.items()}
            encoded = backbone.get_image_features(**blank, return_dict=True)
            layers = [encoded.pooler_output, *(getattr(encoded, "deepstack_features", None) or [])]
            nothings = ((features * 0).sum() for layer in layers for features in layer)
            self.nothing = sum(nothings, torch.zeros((), device=device))
            return None
        if not self.takes_features:
            return None
        encoded = backbone.get_image_features(**given, return_dict=True)
        # The grid stays: positions are made of it too.
        left = {name: value for name, value in kwargs.items() if name == GRID or name not in given}
        return args, {**left, "mm_encoder_outputs": {"image": encoded}}

    def into_embeddings(
        self, language_model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        # Where images enter too: FSDP shards a layer's gradients when those of its input are there, so that with a
        # trained projector the first layer would come in another order on a process without images.
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
