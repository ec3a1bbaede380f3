"""Weights that processes share out among themselves: whole for a moment, or whole for good.

Under ZeRO-3 transformers loads a model so that each process keeps a part of every weight, and what is left of the
weight itself is empty: to write to it, or to copy it, does nothing and says nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType
from torch import nn
from transformers.integrations import deepspeed as transformers_deepspeed


def shares_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only.

    Args:
        accelerator: the run's.

    Returns:
        `True` under ZeRO-3 and FSDP.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Weights to read or to write, inside a `with` block; every process must enter it.

    Args:
        parameters: any; those that are not shared out stay as they are.

    Yields:
        Nothing. What the first process has written is what all processes have afterwards.
    """
    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared, modifier_rank=0):
        yield


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load models on every process whole, also under ZeRO-3: those that no DeepSpeed engine will run.

    Yields:
        Nothing.
    """
    reference = transformers_deepspeed._hf_deepspeed_config_weak_ref
    transformers_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers_deepspeed._hf_deepspeed_config_weak_ref = reference
