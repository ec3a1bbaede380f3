"""What a process holds beside activations: weights, optimizer states, gradients, gathered weights, keys and values.

One function for each part, its formula in the docstring. With DDP every process holds all, with DeepSpeed's ZeRO
shares and buffers (as its version 0.19 was seen to with two CPU processes, `tests/test_launched_memory.py`), with FSDP
shares. All sizes are bytes of one process.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from trl_llava.errors import InputError
from trl_llava.models.load import HEAD
from trl_llava.ppo.generation_batches import bytes_per_token
from trl_llava.tools.plan.processes import Processes

STATE_BYTES = {
    "adamw_torch": ("as weights", 2),
    "adamw_torch_fused": ("as weights", 2),
    "adamw_bnb_8bit": ("bytes", 2),
    "adamw_8bit": ("bytes", 2),
    "sgd": ("bytes", 0),
}
"""States per trained number: tensors of the weights' own dtype, or bytes."""

ALONE = Processes()


def trained(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weights that are trained, each once."""
    return list({id(p): p for model in models for p in model.parameters() if p.requires_grad}.values())


def cast_as_deepspeed(models: Iterable[nn.Module], processes: Processes, bf16: bool) -> None:
    """DeepSpeed turns all weights into bf16 where it trains in bf16, and keeps fp32 copies of trained ones."""
    if processes.deepspeed and bf16:
        for model in models:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)


def weights(model: nn.Module, processes: Processes = ALONE) -> Counter[str]:
    """Weights by part: numbers times the bytes of their dtype; tied weights count once.

    Adapters are what PEFT has put on, and heads what scores; PEFT trains a copy of a head and keeps the original, so
    there are two. 4-bit layers hold half a byte per number and their scales. All else, buffers too, is base. ZeRO-3
    keeps a share of each weight, and small weights whole besides; FSDP a share of each; nobody shares out buffers.
    """
    found: dict[int, tuple[str, int]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        words = name.split(".")
        part = "heads" if HEAD in words else "adapters" if "modules_to_save" in words else "base"
        if any(word.startswith("lora_") for word in words):
            part = "adapters"
        numbers = tensor.numel()
        if processes.zero_stage == 3 and isinstance(tensor, nn.Parameter):
            whole = processes.deepspeed and not _gathers(tensor, processes)
            numbers = processes.share(numbers) + (numbers if whole else 0)
        found[id(tensor)] = (part, numbers * tensor.element_size())
    parts: Counter[str] = Counter()
    for part, size in found.values():
        parts[part] += size
    return parts


def gathered(models: Iterable[nn.Module], processes: Processes) -> int:
    """What ZeRO-3 has gathered at once in a pass, besides the small weights that stay whole: as much as it may.

    The layers that FSDP gathers are not counted.
    """
    if processes.zero_stage != 3 or not processes.deepspeed:
        return 0
    large = {id(p): p for model in models for p in model.parameters() if _gathers(p, processes)}.values()
    numbers = sum(p.numel() for p in large)
    return min(numbers, processes.sizes.live) * max((p.element_size() for p in large), default=0)


def optimizer_states(parameters: list[nn.Parameter], optim: str, processes: Processes = ALONE) -> int:
    """AdamW keeps two numbers per trained number, in that weight's dtype or in 8 bits.

    DeepSpeed's works on its own fp32 copies of what is trained, which count as states; it has them where the weights
    are fp32, too.
    """
    if optim not in STATE_BYTES:
        raise InputError(f"optim is '{optim}', whose memory is not known here; it is for {', '.join(STATE_BYTES)}")
    kind, count = STATE_BYTES[optim]
    numbers = _numbers(parameters)
    copies = 4 * processes.share(numbers) if processes.deepspeed else 0
    if kind == "as weights":
        numbers = 4 * numbers if processes.deepspeed else _bytes(parameters)
    return count * (processes.share(numbers) if processes.zero_stage else numbers) + copies


def step_buffers(parameters: list[nn.Parameter], optim: str, processes: Processes = ALONE) -> int:
    """What the optimizer needs while it steps: `adamw_torch` works on all tensors at once, with a copy of them.

    Under ZeRO-1 and -2 that takes what gradients took before, which are gone by then, and under ZeRO-3 some of it. The
    fused and the 8-bit ones need nothing.
    """
    if optim not in ("adamw_torch", "sgd") or (processes.deepspeed and processes.zero_stage < 3):
        return 0
    return processes.share(_bytes(parameters)) if processes.zero_stage else _bytes(parameters)


def gradients_between_steps(parameters: list[nn.Parameter], processes: Processes) -> int:
    """What is there all the time: ZeRO-3's bucket, and its share of the gradients."""
    if processes.zero_stage != 3 or not processes.deepspeed:
        return 0
    return _bucket(parameters, processes) + _number(parameters) * processes.share(_numbers(parameters))


def gradients_backwards(parameters: list[nn.Parameter], processes: Processes, *, accumulated: bool) -> int:
    """What a backward pass needs besides the gradients themselves and what is there all the time.

    DDP's buckets hold all gradients again. ZeRO-1 and -2 have buckets as large as configured, however little is
    trained; ZeRO-2 also its share of these gradients, and of those `accumulated` over micro-batches before.
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
    """
    whole, share = _bytes(parameters), processes.share(_numbers(parameters))
    if not processes.deepspeed:
        copies = 2 if processes.count > 1 and not processes.fsdp else 1
        return processes.share(whole) if processes.fsdp else copies * whole
    number = _number(parameters)
    flat = (number + (0 if number == 4 else 4)) * share
    if processes.zero_stage == 3:
        return flat
    return flat + number * share + (whole if processes.zero_stage == 1 else 2 * number * share)


def kv_cache(config: PreTrainedConfig, rows: int, length: int, number: int) -> int:
    """Keys and values of a generation of `length` tokens, prompt included; a number takes 2 or 4 bytes."""
    return rows * length * bytes_per_token(config, number)


def _gathers(parameter: nn.Parameter, processes: Processes) -> bool:
    """Whether ZeRO-3 gathers a weight for each use; small ones are whole all the time."""
    threshold = processes.sizes.persistent
    assert threshold is not None, "Processes.for_width sets it"
    return parameter.numel() > threshold


def _bucket(parameters: list[nn.Parameter], processes: Processes) -> int:
    assert processes.sizes.reduce_bucket is not None, "Processes.for_width sets it"
    return processes.sizes.reduce_bucket * _number(parameters)


def _number(parameters: list[nn.Parameter]) -> int:
    """Bytes of a gradient's number."""
    return max((p.element_size() for p in parameters), default=0)


def _numbers(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
