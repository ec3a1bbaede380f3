"""What each of several processes holds: with DDP all, with DeepSpeed's ZeRO shares and buffers, with FSDP shares.

DeepSpeed is as its version 0.19 was seen to be with two CPU processes (`tests/test_launched_memory.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass(frozen=True)
class ZeroSizes:
    """DeepSpeed's `zero_optimization`, as far as it decides memory; numbers of weights, with DeepSpeed's defaults.

    Attributes:
        reduce_bucket: `reduce_bucket_size`, in which gradients are averaged; None: the model's width squared ("auto").
        persistent: `stage3_param_persistence_threshold`; weights up to it are whole on every process; None: ten times
            the model's width ("auto").
        live: `stage3_max_live_parameters`, gathered at once.
        overlap: `overlap_comm`; a second bucket for ZeRO-1 and -2.
    """

    reduce_bucket: int | None = 500_000_000
    persistent: int | None = 100_000
    live: int = 1_000_000_000
    overlap: bool = False


@dataclass(frozen=True)
class Processes:
    """How a run is shared out.

    Attributes:
        count: Number of processes, one GPU each.
        zero_stage: What DeepSpeed shares out: 1 optimizer states, 2 gradients too, 3 weights too (as FSDP does); 0
            with DDP, which shares nothing.
        fsdp: Whether it is FSDP, without DeepSpeed's buffers.
        sizes: DeepSpeed's.
    """

    count: int = 1
    zero_stage: int = 0
    fsdp: bool = False
    sizes: ZeroSizes = field(default_factory=ZeroSizes)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed trains.

        Returns:
            Whether.
        """
        return self.zero_stage > 0 and not self.fsdp

    def for_width(self, width: int) -> "Processes":
        """With what "auto" means for a model.

        Args:
            width: Its hidden size.

        Returns:
            A copy.
        """
        sizes = self.sizes
        bucket = width * width if sizes.reduce_bucket is None else sizes.reduce_bucket
        persistent = 10 * width if sizes.persistent is None else sizes.persistent
        return replace(self, sizes=replace(sizes, reduce_bucket=bucket, persistent=persistent))

    def share(self, count: int) -> int:
        """A process's share.

        Args:
            count: Numbers or bytes.

        Returns:
            Its part, rounded up.
        """
        return -(-count // self.count)


def cast_as_deepspeed(models: Iterable[nn.Module], processes: Processes, bf16: bool) -> None:
    """DeepSpeed turns all weights into bf16 where it trains in bf16, and keeps fp32 copies of trained ones.

    Args:
        models: Those that it trains, on the meta device.
        processes: How the run is shared out.
        bf16: Whether the recipe trains in bf16.
    """
    if processes.deepspeed and bf16:
        for model in models:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)


def bytes_of(tensor: torch.Tensor, processes: Processes) -> int:
    """What a process keeps of one weight or buffer between steps.

    ZeRO-3 keeps a share of each weight, and small weights whole besides; FSDP a share of each.

    Args:
        tensor: A parameter, or a buffer, which nobody shares out.
        processes: How the run is shared out.

    Returns:
        Bytes.
    """
    numbers = tensor.numel()
    if processes.zero_stage == 3 and isinstance(tensor, nn.Parameter):
        whole = processes.deepspeed and not _gathers(tensor, processes)
        numbers = processes.share(numbers) + (numbers if whole else 0)
    return numbers * tensor.element_size()


def gathered(models: Iterable[nn.Module], processes: Processes) -> int:
    """What ZeRO-3 has gathered at once in a pass, besides the small weights that stay whole: as much as it may.

    The layers that FSDP gathers are not counted.

    Args:
        models: Those that run.
        processes: How the run is shared out.

    Returns:
        Bytes.
    """
    if processes.zero_stage != 3 or not processes.deepspeed:
        return 0
    weights = {id(p): p for model in models for p in model.parameters() if _gathers(p, processes)}.values()
    numbers = sum(p.numel() for p in weights)
    return min(numbers, processes.sizes.live) * max((p.element_size() for p in weights), default=0)


def masters(parameters: list[nn.Parameter], processes: Processes) -> int:
    """DeepSpeed's own fp32 copies of what is trained, shared out; it has them where the weights are fp32, too.

    Args:
        parameters: What is trained.
        processes: How the run is shared out.

    Returns:
        Bytes.
    """
    return 4 * processes.share(_numbers(parameters)) if processes.deepspeed else 0


def gradients_between_steps(parameters: list[nn.Parameter], processes: Processes) -> int:
    """What is there all the time: ZeRO-3's bucket, and its share of the gradients.

    Args:
        parameters: What is trained.
        processes: How the run is shared out.

    Returns:
        Bytes.
    """
    if processes.zero_stage != 3 or not processes.deepspeed:
        return 0
    return _bucket(parameters, processes) + _number(parameters) * processes.share(_numbers(parameters))


def gradients_backwards(parameters: list[nn.Parameter], processes: Processes, *, accumulated: bool) -> int:
    """What a backward pass needs besides the gradients themselves and what is there all the time.

    DDP's buckets hold all gradients again. ZeRO-1 and -2 have buckets as large as they were told, however little is
    trained; ZeRO-2 also its share of these gradients, and of those of the micro-batches before.

    Args:
        parameters: What is trained.
        processes: How the run is shared out.
        accumulated: Whether there were micro-batches before.

    Returns:
        Bytes.
    """
    if processes.zero_stage == 0:
        return _number(parameters) * _numbers(parameters) if processes.count > 1 else 0
    if not processes.deepspeed or processes.zero_stage == 3:
        return 0
    found = _bucket(parameters, processes) * (2 if processes.sizes.overlap else 1)
    if processes.zero_stage == 2:
        found += (2 if accumulated else 1) * _number(parameters) * processes.share(_numbers(parameters))
    return found


def gradients_at_the_step(parameters: list[nn.Parameter], processes: Processes) -> int:
    """Gradients when the optimizer steps, besides what is there all the time.

    DeepSpeed makes one tensor of its share, and an fp32 one of that. Under ZeRO-1 and -2 what they are made of goes
    only then: the sum over micro-batches, and all gradients, or two more tensors of its share.

    Args:
        parameters: What is trained.
        processes: How the run is shared out.

    Returns:
        Bytes.
    """
    whole, share = sum(p.numel() * p.element_size() for p in parameters), processes.share(_numbers(parameters))
    if not processes.deepspeed:
        copies = 2 if processes.count > 1 and not processes.fsdp else 1
        return processes.share(whole) if processes.fsdp else copies * whole
    number = _number(parameters)
    flat = (number + (0 if number == 4 else 4)) * share
    if processes.zero_stage == 3:
        return flat
    return flat + number * share + (whole if processes.zero_stage == 1 else 2 * number * share)


def _gathers(parameter: nn.Parameter, processes: Processes) -> bool:
    """Whether ZeRO-3 gathers a weight for each use; small ones are whole all the time."""
    threshold = processes.sizes.persistent
    assert threshold is not None, "for_width says"
    return parameter.numel() > threshold


def _bucket(parameters: list[nn.Parameter], processes: Processes) -> int:
    assert processes.sizes.reduce_bucket is not None, "for_width says"
    return processes.sizes.reduce_bucket * _number(parameters)


def _number(parameters: list[nn.Parameter]) -> int:
    """Bytes of a gradient's number."""
    return max((p.element_size() for p in parameters), default=0)


def _numbers(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
