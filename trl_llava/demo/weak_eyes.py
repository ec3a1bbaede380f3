"""Make a copy of a LLaVA that sees less: the same weights behind a tower that takes smaller images."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from trl_llava.models.load import load_processor


@torch.no_grad()
def make_weak_eyed(base: str | Path, output_dir: str | Path, image_size: int) -> None:
    """Save a LLaVA whose CLIP tower sees images of `image_size` pixels, with as many image tokens as before.

    The kernel that embeds a patch is summed over blocks, which is the same as blowing the small image up to the old
    size before the old kernel. So colours and places stay and shapes blur, as details of a photo do at 224 pixels.
    """
    model = AutoModelForImageTextToText.from_pretrained(base)
    processor = load_processor(str(base))
    tower = model.model.vision_tower
    old = tower.embeddings.patch_embedding
    factor, rest = divmod(tower.config.image_size, image_size)
    patch = old.kernel_size[0] // factor
    if rest or patch * factor != old.kernel_size[0]:
        raise ValueError(
            f"image_size {image_size} does not divide the tower's: images of {tower.config.image_size} pixels in "
            f"patches of {old.kernel_size[0]}."
        )
    new = nn.Conv2d(old.in_channels, old.out_channels, patch, patch, bias=old.bias is not None)
    new.weight.copy_(old.weight.unflatten(3, (patch, factor)).unflatten(2, (patch, factor)).sum(dim=(3, 5)))
    if old.bias is not None:
        new.bias.copy_(old.bias)
    tower.embeddings.patch_embedding = new
    for config in (tower.config, model.config.vision_config):
        config.image_size, config.patch_size = image_size, patch
    processor.patch_size = patch
    processor.image_processor.size = {"height": image_size, "width": image_size}
    processor.image_processor.crop_size = {"height": image_size, "width": image_size}
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
