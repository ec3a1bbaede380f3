"""Prompts as a model reads them, and the images that go with them.

Letters: `B` batch, `Q` query length (image tokens included), `I` images, `N` image tokens, `H` hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

# LLaVA-OneVision's processor says how many images each row has, rows without any left out.
COUNTS = "batch_num_images"


def counts_images(processor: Any) -> bool:
    """Whether a processor (or a tokenizer: no) tiles an image only where it is its row's only one, as OneVision's."""
    return COUNTS in getattr(getattr(processor, "image_processor", None), "model_input_names", ())


@dataclass
class ModelInputs:
    """A batch of prompts as one model's processor encodes them; a row's images never part from it."""

    input_ids: torch.Tensor  # (B, Q) long, left-padded
    attention_mask: torch.Tensor  # (B, Q) long, 1 at real tokens
    images_per_row: list[int]  # B numbers, I in all
    # What else the model takes: `pixel_values` and `image_sizes` with one entry per image, which stay where the batch
    # was made until a pass needs them, (B, Q) kinds of tokens, or entries per row.
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: list[int] = field(
        default_factory=list
    )  # B numbers of prompts: rows with the same one have the same prompt
    # (N, H) of each image, made once for all passes of a step; they stand in the place of the pixels, which are gone.
    features: list[torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.groups = self.groups or list(range(len(self.input_ids)))

    @classmethod
    def from_batch(cls, batch: dict[str, Any], device: torch.device) -> "ModelInputs":
        """Take the tensors out of what `PromptCollator` returns; those of tokens go to `device`."""
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        shape = tensors["input_ids"].shape
        tensors = {key: value.to(device) if value.shape == shape else value for key, value in tensors.items()}
        images_per_row = [len(images) for images in batch["columns"]["images"]]
        return cls(tensors.pop("input_ids"), tensors.pop("attention_mask"), images_per_row, tensors)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def query_length(self) -> int:
        """Q, the padded length of the prompts in tokens."""
        return self.input_ids.shape[1]

    @property
    def lengths(self) -> list[int]:
        """The length of each prompt in tokens, without padding."""
        return self.attention_mask.sum(1).tolist()

    @property
    def can_be_packed(self) -> bool:
        """Whether prompts repeat, and nothing but their ids goes with their tokens."""
        return len(set(self.groups)) < len(self) and not self.with_tokens()

    def with_tokens(self) -> dict[str, torch.Tensor]:
        """The extras with one entry for each token, (B, Q) each."""
        return {key: value for key, value in self.extras.items() if value.shape == self.input_ids.shape}

    def repeated(self, times: int) -> "ModelInputs":
        """Every prompt `times` times, its copies beside each other; image features are not copied."""
        return self if times == 1 else self.select([row for row in range(len(self)) for _ in range(times)])

    def select(self, rows: Sequence[int]) -> "ModelInputs":
        """Pick rows in this order, each with its own images, padded to the longest of them."""
        rows = list(rows)
        padding = self.query_length - int(self.attention_mask[rows].sum(1).max())
        extras = self.images_of(rows)
        extras |= {key: value[rows, padding:] for key, value in self.with_tokens().items()}
        return ModelInputs(
            self.input_ids[rows, padding:],
            self.attention_mask[rows, padding:],
            [self.images_per_row[row] for row in rows],
            extras,
            [self.groups[row] for row in rows],
            None if self.features is None else [self.features[image] for image in self._images(rows)],
        )

    def _images(self, rows: Sequence[int]) -> list[int]:
        """Indices of the images of these rows."""
        starts = [sum(self.images_per_row[:row]) for row in range(len(self))]
        return [starts[row] + offset for row in rows for offset in range(self.images_per_row[row])]

    def images_of(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The extras that go with the images of some rows; none if the rows have no image."""
        images, extras = self._images(rows), {}
        for key, value in self.extras.items():
            if key == COUNTS:
                if images:
                    counts = [self.images_per_row[row] for row in rows if self.images_per_row[row]]
                    extras[key] = torch.tensor(counts, dtype=value.dtype, device=value.device)
            elif value.shape[0] == sum(self.images_per_row) and value.shape != self.input_ids.shape:
                if images:  # a model takes no empty `pixel_values`
                    extras[key] = value[images]
            elif value.shape != self.input_ids.shape:
                raise ValueError(
                    f"cannot split the model input `{key}` of shape {tuple(value.shape)} into rows: expected one "
                    f"entry for each of the {sum(self.images_per_row)} images or a tensor of shape "
                    f"{tuple(self.input_ids.shape)}. Processors that flatten image patches do not work in PPO yet"
                )
        return extras

    def image_kwargs(self) -> dict[str, Any]:
        """The images as keyword arguments of a forward pass or of `generate`, on the tokens' device."""
        device = self.input_ids.device
        kwargs: dict[str, Any] = {key: value.to(device, non_blocking=True) for key, value in self.extras.items()}
        if self.features:
            features = [feature.to(device, non_blocking=True) for feature in self.features]
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return kwargs
