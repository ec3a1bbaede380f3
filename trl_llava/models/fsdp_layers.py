"""Which layers FSDP gathers one by one: those of the model at hand, with weights on every process.

accelerate takes them from the model's class, and a LLaVA's names parts that the model has not (the text side of CLIP):
it would refuse every LLaVA.
"""

from accelerate import Accelerator
from torch import nn

from trl_llava.errors import InputError


def shard_by_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Name the layers to accelerate, unless the launch configuration has named some.

    Args:
        model: the model that will be prepared, with or without PEFT around it.
        accelerator: the one that will prepare it; without FSDP nothing changes.

    Raises:
        InputError: if the first process alone has loaded weights that are trained.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    empty = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.is_meta]
    if empty:  # accelerate tells parameters apart by where they lie, and these lie nowhere
        raise InputError(
            f"under FSDP, process {accelerator.process_index} has {len(empty)} trained weights without values (first "
            f"{empty[0]}), which its optimizer would mix up. Set `fsdp_cpu_ram_efficient_loading: false` in the "
            "launch configuration"
        )
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = layer_names(model)


def layer_names(model: nn.Module) -> list[str]:
    """The layers of language model and vision tower, by the names of their classes.

    Args:
        model: an image-text model, with or without PEFT around it.

    Returns:
        The names, sorted; each is there in the model.
    """
    indivisible = set(getattr(model, "_no_split_modules", None) or [])
    return sorted({type(module).__name__ for module in model.modules()} & indivisible)
