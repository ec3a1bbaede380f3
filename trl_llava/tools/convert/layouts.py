"""The layouts that LLaVA's and the paper's code save: found on disk or the Hub, told apart, and read."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from trl_llava.errors import InputError, NotFoundError
from trl_llava.hub.lookup import not_found
from trl_llava.hub.names import split_revision

Kind = Literal["model", "policy adapter", "reward model", "ppo checkpoint"]

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Layout:
    """What a folder holds."""

    kind: Kind
    folder: Path
    adapter: Path | None = None  # folder of the policy's or the reward model's adapter
    value_adapter: Path | None = None  # folder of the value model's adapter (PPO checkpoints)
    head: Path | None = None  # file of the reward or value head


def find_source(source: str, revision: str | None = None) -> Path:
    """Find a checkpoint, and download it if it is on the Hub.

    A Hub ID may have a folder inside the repository behind it (`zhiqings/LLaVA-RLHF-7b-v1.5-224/sft_model`).
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    source, revision = split_revision("SRC", source, revision)
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 2:
        raise NotFoundError(f"SRC {source} does not exist. Expected a folder, or a Hub ID such as org/name/folder")
    inside = "/".join(parts[2:])
    name = "/".join(parts[:2])
    try:
        repository = snapshot_download(name, revision=revision, allow_patterns=f"{inside}/*" if inside else None)
    except (OSError, ValueError) as error:
        raise NotFoundError(not_found("SRC", name, revision, error)) from error
    folder = Path(repository, inside)
    if not folder.is_dir():
        raise NotFoundError(f"the repository {name} has no folder {inside!r}")
    return folder


def detect(folder: Path) -> Layout:
    """Tell which layout a folder has, all of whose parts must be there."""
    policy, value = (folder / "adapter_model" / name for name in ("lora_policy", "lora_value"))
    if (folder / "value_head.pt").is_file() or policy.is_dir():
        parts = {"the policy's adapter": policy / "adapter_config.json", "the value's": value / "adapter_config.json"}
        parts["the value head"] = folder / "value_head.pt"
        missing = [f"{part} ({file.relative_to(folder)})" for part, file in parts.items() if not file.is_file()]
        if missing:
            raise InputError(f"{folder} is a PPO checkpoint without {' and without '.join(missing)}")
        return Layout("ppo checkpoint", folder, policy, value, parts["the value head"])
    places = (folder / "adapter_model" / "lora_default", folder / "lora_default", folder / "adapter_model", folder)
    adapter = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    head = folder / "reward_head"
    if head.is_file() and adapter is None:
        raise InputError(f"{folder} has a reward_head, but no adapter in adapter_model/lora_default")
    if head.is_file():
        return Layout("reward model", folder, adapter, head=head)
    if adapter == places[0]:
        raise InputError(
            f"{folder} is laid out as a reward model, but it has no reward_head, so its scores would be random. Get "
            f"the complete checkpoint; if it is a policy's adapter after all, give {adapter} as SRC"
        )
    if adapter is not None:
        return Layout("policy adapter", folder, adapter)
    weights = [name for name in _MODEL_INDEXES + _MODEL_WEIGHTS if (folder / name).is_file()]
    if (folder / "config.json").is_file() and weights:
        return Layout("model", folder)
    steps = sorted(path.name for path in folder.glob("checkpoint-*"))
    if steps:
        raise InputError(f"{folder} holds checkpoints; give one of them as SRC: {', '.join(steps)}")
    raise InputError(
        f"{folder} is in none of the layouts that can be converted: it holds "
        f"{sorted(path.name for path in folder.iterdir())}. Expected config.json with pytorch_model*.bin (a model), "
        "adapter_model/lora_default with reward_head (a reward model), lora_default (a policy's adapter), or "
        "adapter_model/lora_policy and lora_value with value_head.pt (a PPO checkpoint)"
    )


def model_shards(folder: Path) -> list[Path]:
    """The weight files of a model, each to be read with `read_shard`."""
    for name in _MODEL_INDEXES:
        if (folder / name).is_file():
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            files = [folder / file for file in sorted(set(index["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise InputError(f"{folder / name} names {missing}, which are not there: get the complete checkpoint")
            return files
    return [folder / name for name in _MODEL_WEIGHTS if (folder / name).is_file()][:1]


def adapter_shard(folder: Path) -> Path:
    """The weight file of an adapter."""
    for name in _ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} has an adapter_config.json, but none of {', '.join(_ADAPTER_WEIGHTS)}")


def read_shard(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a weight file one by one, without running anything that a pickle may hold.

    They are mapped from the file where its format allows that, so only what is used takes memory; a `.bin` of PyTorch
    1.5 or earlier is read whole.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                yield name, opened.get_tensor(name)
        return
    try:
        tensors: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{file} cannot be read as tensors alone, and nothing else is loaded: a pickle may run code. "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{file} holds a {type(tensors).__name__}, expected tensors by name")
    yield from tensors.items()
