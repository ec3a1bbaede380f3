"""Weights that are sharded over processes, by ZeRO-3 and FSDP: where, by which layers, and how to have them whole.

Under ZeRO-3 transformers loads a model so that each process keeps a part of every weight, and the weight itself is
empty: to write to it, or to copy it, does nothing and raises nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType
from torch import nn
from transformers.integrations import deepspeed as transformers_deepspeed

from trl_llava.errors import InputError


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only: under ZeRO-3 and FSDP."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make weights whole inside a `with` block, which every process must enter; those not sharded stay as they are.

    All processes get the values that the first one has written.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
        yield


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load models whole on every process, also under ZeRO-3: those that no DeepSpeed engine will run."""
    reference = transformers_deepspeed._hf_deepspeed_config_weak_ref
    transformers_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers_deepspeed._hf_deepspeed_config_weak_ref = reference


def shard_by_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Name the layers that FSDP gathers one by one to accelerate, unless the launch configuration has named some.

    accelerate takes them from the model's class, and a LLaVA's names parts that the model has not (the text side of
    CLIP): it would refuse every LLaVA.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    empty = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.is_meta]
    if empty:  # accelerate tells parameters apart by their place in memory, and these have none
        raise InputError(
            f"under FSDP, process {accelerator.process_index} has {len(empty)} trained weights without values (first "
            f"{empty[0]}), which its optimizer would mix up. Set `fsdp_cpu_ram_efficient_loading: false` in the "
            "launch configuration"
        )
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = layer_names(model)


def layer_names(model: nn.Module) -> list[str]:
    """The class names of the layers of language model and vision tower, sorted; each is there in the model."""
    indivisible = set(getattr(model, "_no_split_modules", None) or [])
    return sorted({type(module).__name__ for module in model.modules()} & indivisible)
