"""Prompts as a model reads them, and the images that go with them.

Letters: `B` batch, `Q` query length (image tokens included), `N` image tokens of an image, `H` hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

# LLaVA-OneVision's processor says how many images each row has, rows without any left out.
COUNTS = "batch_num_images"


def counts_images(processor: Any) -> bool:
    """Whether a processor (or a tokenizer: no) tiles an image only where it is its row's only one, as OneVision's."""
    return COUNTS in getattr(getattr(processor, "image_processor", None), "model_input_names", ())


FeatureForm = Literal["list", "stacked", "deepstack"]
"""How a model returns the features of images: one tensor each; all in one; for each image those of several layers."""


@dataclass
class ImageFeatures:
    """Features of the images of B rows, made once for all passes of a step."""

    # Of each row one tensor for each image, or for each tile where the model does not join an image's tiles: (N, H);
    # in the form "deepstack" (1 + layers, N, H).
    rows: list[list[torch.Tensor]]
    form: FeatureForm

    def outputs(self, device: torch.device) -> dict[str, BaseModelOutputWithPooling]:
        """What a forward pass takes as `mm_encoder_outputs`; empty if no row has an image."""
        features = [feature.to(device, non_blocking=True) for row in self.rows for feature in row]
        if not features:
            return {}
        if self.form == "stacked":
            return {"image": BaseModelOutputWithPooling(pooler_output=torch.stack(features))}
        if self.form == "list":
            return {"image": BaseModelOutputWithPooling(pooler_output=features)}
        output = BaseModelOutputWithPooling(pooler_output=[feature[0] for feature in features])
        output.deepstack_features = [[feature[layer] for feature in features] for layer in range(1, len(features[0]))]
        return {"image": output}


@dataclass
class ModelInputs:
    """A batch of prompts as one model's processor encodes them; a row's images never part from it."""

    input_ids: torch.Tensor  # (B, Q) long, left-padded
    attention_mask: torch.Tensor  # (B, Q) long, 1 at real tokens
    # By name, of each row its entries of an image tensor (`pixel_values`, ...): tiles, patches, or the whole; none for
    # a row without images. They stay where the batch was made until a pass needs them.
    images: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, Q) by name: what kind of token each is
    groups: list[int] = field(
        default_factory=list
    )  # B numbers of prompts: rows with the same one have the same prompt
    features: ImageFeatures | None = None  # in the place of the image tensors that they are made of, which are gone

    def __post_init__(self) -> None:
        self.groups = self.groups or list(range(len(self.input_ids)))

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], device: torch.device) -> "ModelInputs":
        """Take the tensors out of what `PromptCollator` returns; those of tokens go to `device`."""
        counts = batch["image_counts"]
        tokens = {
            name: value.to(device)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and name not in counts
        }
        images = split_by_rows(batch, counts)
        return cls(tokens.pop("input_ids"), tokens.pop("attention_mask"), images, tokens)

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
        return len(set(self.groups)) < len(self) and not self.tokens

    def repeated(self, times: int) -> "ModelInputs":
        """Every prompt `times` times, its copies beside each other; images and their features are not copied."""
        return self if times == 1 else self.select([row for row in range(len(self)) for _ in range(times)])

    def select(self, rows: Sequence[int]) -> "ModelInputs":
        """Pick rows in this order, each with its own images, padded to the longest of them."""
        rows = list(rows)
        padding = self.query_length - int(self.attention_mask[rows].sum(1).max())
        features = self.features
        return ModelInputs(
            self.input_ids[rows, padding:],
            self.attention_mask[rows, padding:],
            {name: [entries[row] for row in rows] for name, entries in self.images.items()},
            {name: value[rows, padding:] for name, value in self.tokens.items()},
            [self.groups[row] for row in rows],
            None if features is None else ImageFeatures([features.rows[row] for row in rows], features.form),
        )

    def image_tensors(self) -> dict[str, torch.Tensor]:
        """The image tensors of all rows; none if no row has an image, for models take no empty ones."""
        found = {name: [entry for entry in entries if len(entry)] for name, entries in self.images.items()}
        return {name: _joined(entries) for name, entries in found.items() if entries}

    def prompt_kwargs(self) -> dict[str, Any]:
        """All that a model reads of the prompts, as keyword arguments of `generate`; padding becomes id 0.

        A pad id may lie outside of the embedding.
        """
        return {
            "input_ids": self.input_ids.masked_fill(self.attention_mask == 0, 0),
            "attention_mask": self.attention_mask,
            **self.tokens,
            **self.image_kwargs(),
        }

    def image_kwargs(self) -> dict[str, Any]:
        """The images as keyword arguments of a forward pass or of `generate`, on the tokens' device."""
        device = self.input_ids.device
        kwargs: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in self.image_tensors().items()
        }
        if self.features is not None and (outputs := self.features.outputs(device)):
            kwargs["mm_encoder_outputs"] = outputs
        return kwargs


def split_by_rows(
    tensors: Mapping[str, torch.Tensor], counts: Mapping[str, Sequence[int]]
) -> dict[str, list[torch.Tensor]]:
    """Cut image tensors into the entries of each row; `counts` says how many of them each row has."""
    return {name: list(tensors[name].split(list(own))) for name, own in counts.items()}


def _joined(entries: list[torch.Tensor]) -> torch.Tensor:
    if len(entries) == 1:
        return entries[0]
    return torch.cat(entries)
