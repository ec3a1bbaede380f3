"""Batches of a given size, as processors and collators make them.

Letters: `B` batch, `L` sequence, `I` images.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig


def image_inputs(config: PreTrainedConfig, images: int, fake: FakeTensorMode) -> dict[str, torch.Tensor]:
    """`pixel_values` (I, 3, size, size) of I images, without memory; nothing where there are none.

    For the families that tile (I, tiles + 1, 3, size, size) of the largest grid, and `image_sizes` (I, 2).
    """
    if not images:
        return {}
    size = config.vision_config.image_size
    grids = getattr(config, "image_grid_pinpoints", None)
    tiles, sizes = [], {}
    if grids:
        height, width = max(grids, key=lambda grid: grid[0] * grid[1])
        tiles = [1 + (height // size) * (width // size)]
        sizes = {"image_sizes": torch.tensor([[height, width]] * images)}
    with fake:
        return {"pixel_values": torch.empty(images, *tiles, 3, size, size), **sizes}


def text_inputs(rows: int, length: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (B, L) long, of rows of L tokens; image tokens are like all others.

    All rows but the first are a token shorter, padded at the right or `left`: attention takes a mask where there is
    padding, as in any real batch.
    """
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, 0 if left else -1] = int(length == 1)
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}
