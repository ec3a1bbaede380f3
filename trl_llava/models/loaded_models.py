"""Which models a run has loaded, the roles of each, and their size in memory."""

from collections.abc import Mapping

import torch
from torch import nn

from trl_llava.models.adapter_role import AdapterRole, host_of
from trl_llava.models.base_model import base_of
from trl_llava.models.load import HEAD

GIB = 2**30


def describe_models(roles: Mapping[str, nn.Module]) -> str:
    """A total, then one line for each model in memory with its roles and its GiB."""
    models: dict[nn.Module, list[str]] = {}
    for role, model in roles.items():
        models.setdefault(host_of(model), []).append(role)
    counted: set[int] = set()
    lines, total = [], 0
    for model, names in models.items():
        heads = [role for role in roles.values() if isinstance(role, AdapterRole) and role.host is model]
        tensors = [named for part in (model, *heads) for named in (*part.named_parameters(), *part.named_buffers())]
        base = bytes_of([tensor for name, tensor in tensors if not _beside_the_base(name)], counted)
        beside = bytes_of([tensor for name, tensor in tensors if _beside_the_base(name)], counted)
        total += base + beside
        inner = base_of(model)
        adapters = f" + {_size(beside)} of adapters and heads" if beside else ""
        lines.append(f"  {inner.name_or_path} ({type(inner).__name__}) {_size(base)}{adapters}: {', '.join(names)}")
    return "\n".join([f"{len(models)} base model{'s' * (len(models) > 1)} loaded, {_size(total)}", *lines])


def _size(number: int) -> str:
    """Bytes in GiB, few of them in MiB."""
    return f"{number / GIB:.2f} GiB" if number >= 0.01 * GIB else f"{number / 2**20:.2g} MiB"


def bytes_of(tensors: list[torch.Tensor], counted: set[int]) -> int:
    """Bytes of tensors, each storage counted once: those in `counted`, by address, not again."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _beside_the_base(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter or a head."""
    parts = name.split(".")
    return any(part.startswith("lora_") for part in parts) or "modules_to_save" in parts or HEAD in parts
