"""The numbers of the paper's published code: in tests/golden/paper/, or where TRL_LLAVA_GOLDEN points.

A second set of the same structure (other seeds, other texts) must pass the same tests, so no test holds a value of it.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file

from trl_llava.tools.convert.convert_checkpoint import convert

GOLDEN = Path(os.environ.get("TRL_LLAVA_GOLDEN") or Path(__file__).parent / "golden" / "paper")
MODEL = GOLDEN / "4_model"
VARIANTS = ("legacy", "nonlegacy")
IMAGE = -200
"""How the original marks the one slot of an image."""


@cache
def read(name: str) -> Any:
    """A JSON file of the set."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    """A safetensors file of the set; not to be changed in place."""
    return load_file(GOLDEN / name)


def convert_base(folder: Path, variant: str | None = None) -> Path:
    """Convert the set's model, with the tokenizer of a variant."""
    source = MODEL / "sft_model"
    if variant is not None:
        source = shutil.copytree(source, folder / f"source-{variant}", copy_function=shutil.copyfile)
        for file in (GOLDEN / f"tokenizer_{variant}").iterdir():
            shutil.copyfile(file, source / file.name)
    target = folder / f"base-{variant}"
    convert(str(source), target, vision_tower=clip())
    return target


def clip() -> str:
    """The CLIP folder that the set's model refers to."""
    return str(MODEL / read("4_model/sft_model/config.json")["mm_vision_tower"])


def rows(records: list[dict[str, Any]]) -> Dataset:
    """Records in the published JSON shape; image names become files of the set."""
    placed = []
    for record in records:
        shown = any("<image>" in turn["value"] for turn in record["conversations"] if turn["from"] == "human")
        image = record.get("image", sorted(path.name for path in (GOLDEN / "images").iterdir())[0])
        placed.append({**record, "image": str(GOLDEN / "images" / image) if shown else None})
    columns = dict.fromkeys(name for record in placed for name in record)
    return Dataset.from_dict({name: [record.get(name) for record in placed] for name in columns})


def collapsed(ids: list[int], image_token: int, parallel: list[int] | None = None) -> list[int]:
    """One slot per image, as the original writes it; of a parallel list, the entries at the kept slots."""
    kept = [i for i, token in enumerate(ids) if token != image_token or i == 0 or ids[i - 1] != image_token]
    if parallel is not None:
        return [parallel[i] for i in kept]
    return [IMAGE if ids[i] == image_token else ids[i] for i in kept]


def expanded(
    ids: torch.Tensor, mask: torch.Tensor, image_token: int, image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The other way round: `image_tokens` tokens for each slot; every row has the same number of images."""
    new_ids, new_mask = [], []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        wide = [
            (token, r)
            for token, r in zip(row, real, strict=True)
            for _ in range(image_tokens if token == IMAGE else 1)
        ]
        new_ids.append([image_token if token == IMAGE else token for token, _ in wide])
        new_mask.append([r for _, r in wide])
    return torch.tensor(new_ids), torch.tensor(new_mask)
