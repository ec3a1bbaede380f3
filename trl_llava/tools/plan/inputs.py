"""Batches of a given size, as processors and collators make them.

Letters: `B` batch, `L` sequence, `I` images.
"""

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from trl_llava.errors import RecipeError
from trl_llava.models.families import GRID, family_of

MOST_TILES = {"internvl": 13, "idefics3": 17, "smolvlm": 17}
"""Tiles of an image, the small whole one included, as the processors on the Hub cut at most."""


def image_inputs(config: PreTrainedConfig, images: int, fake: FakeTensorMode, most: int) -> dict[str, torch.Tensor]:
    """What a processor makes of I images of the largest size, without memory; nothing where there are none.

    Where that size has no bound in the config, an image has the `most` image tokens that its row leaves it.
    """
    if not images:
        return {}
    vision, sizes = config.vision_config, {}
    if config.model_type.startswith("qwen3"):
        raise RecipeError(
            "plan does not know Qwen3-VL: several of its layers take image features, which rows without real image "
            "tokens cannot show. Start with a small batch, and read the peak in the log"
        )
    if config.model_type.startswith("qwen"):
        return _patches(vision, images, fake, most)
    if vision.model_type == "pixtral":
        rows, columns = _sides(min(most, (vision.image_size // vision.patch_size) ** 2))
        shape = [images, 3, rows * vision.patch_size, columns * vision.patch_size]
        sizes = {"image_sizes": torch.tensor([shape[2:]] * images)}
    else:
        height, width = _pair(vision.image_size)
        tiles: list[int] = []
        if grids := getattr(config, "image_grid_pinpoints", None):
            largest = max(grids, key=lambda grid: grid[0] * grid[1])
            tiles, sizes = (
                [1 + math.prod(largest) // (height * width)],
                {"image_sizes": torch.tensor([largest] * images)},
            )
        elif config.model_type in MOST_TILES:
            tiles = [max(1, min(MOST_TILES[config.model_type], most // _tokens_of_tile(config)))]
        shape = [images, *tiles, 3, height, width]
        if config.model_type == "internvl":  # tiles one behind the other
            shape = [math.prod(shape[:-3]), *shape[-3:]]
    with fake:
        return {"pixel_values": torch.empty(*shape), **sizes}


def _patches(vision: Any, images: int, fake: FakeTensorMode, most: int) -> dict[str, torch.Tensor]:
    """Qwen's: (patches, numbers of a patch) and (I, 3) the patches in time, height and width of each image."""
    merge = vision.spatial_merge_size
    rows, columns = (side * merge for side in _sides(most))
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    with fake:
        pixels = torch.empty(images * rows * columns, numbers)
    return {"pixel_values": pixels, GRID: torch.tensor([[1, rows, columns]] * images)}


def _sides(count: int) -> tuple[int, int]:
    """Two sides, nearly equal, of a rectangle of at most `count` squares."""
    rows = max(1, math.isqrt(count))
    return rows, max(1, count // rows)


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


def _tokens_of_tile(config: PreTrainedConfig) -> int:
    """How many image tokens a tile becomes."""
    vision = config.vision_config
    patches = math.prod(_pair(vision.image_size)) // math.prod(_pair(vision.patch_size))
    if config.model_type == "internvl":
        return max(1, int(patches * config.downsample_ratio**2))
    return max(1, patches // config.scale_factor**2)


def token_kinds(config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
    """What kind each of (B, L) tokens is, for models that take it; here all are text."""
    family = family_of(config)
    if family is None or family.token_kinds is None:
        return {}
    return {family.token_kinds: torch.zeros(rows, length, dtype=torch.long)}


def text_inputs(rows: int, length: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (B, L) long, of rows of L tokens; image tokens are like all others.

    All rows but the first are a token shorter, padded at the right or `left`: attention takes a mask where there is
    padding, as in any real batch.
    """
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, 0 if left else -1] = int(length == 1)
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}
