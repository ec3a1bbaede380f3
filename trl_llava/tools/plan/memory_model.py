"""What a training step holds in memory, part by part: one function for each part, its formula in the docstring.

Weights, optimizer states and gradients are counted; activations, image features and logits come from a dry run.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig

from trl_llava.errors import InputError
from trl_llava.models.load import HEAD
from trl_llava.ppo.generation_batches import bytes_per_token
from trl_llava.tools.plan.sharing import Processes, bytes_of, masters

PARTS = (
    "base",
    "adapters",
    "heads",
    "gathered weights",
    "optimizer",
    "gradients",
    "activations",
    "image features",
    "KV cache",
    "logits",
)
"""All parts, in the order in which they are shown."""

STATE_BYTES = {
    "adamw_torch": ("as weights", 2),
    "adamw_torch_fused": ("as weights", 2),
    "adamw_bnb_8bit": ("bytes", 2),
    "adamw_8bit": ("bytes", 2),
    "sgd": ("bytes", 0),
}
"""States per trained number: tensors of the weights' own dtype, or bytes."""

ALONE = Processes()


@dataclass
class Moment:
    """What is in memory at the worst moment of one phase.

    Attributes:
        phase: Its name.
        parts: Bytes of each of `PARTS` that is there.
    """

    phase: str
    parts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes in all.

        Returns:
            Their sum.
        """
        return self.parts.total()


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; one that is shared counts once.

    Args:
        tensors: Real, meta or fake ones.

    Returns:
        Their sum.
    """
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def weights(model: nn.Module, processes: Processes = ALONE) -> Counter[str]:
    """Weights by part: numbers times the bytes of their dtype; tied weights count once.

    Adapters are what PEFT has put on, and heads what scores; PEFT trains a copy of a head and keeps the original, so
    there are two. 4-bit layers hold half a byte per number and their scales. All else, buffers too, is base.

    Args:
        model: A model, with or without PEFT around it.
        processes: How the run is shared out.

    Returns:
        Bytes of "base", "adapters" and "heads", of one process.
    """
    found: dict[int, tuple[str, int]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        words = name.split(".")
        if any(word.startswith("lora_") for word in words):
            part = "adapters"
        elif HEAD in words:
            part = "heads"
        else:
            part = "adapters" if "modules_to_save" in words else "base"
        found[id(tensor)] = (part, bytes_of(tensor, processes))
    parts: Counter[str] = Counter()
    for part, count in found.values():
        parts[part] += count
    return parts


def trained(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weights that are trained.

    Args:
        models: The models.

    Returns:
        Each once.
    """
    return list({id(p): p for model in models for p in model.parameters() if p.requires_grad}.values())


def optimizer_states(parameters: list[nn.Parameter], optim: str, processes: Processes = ALONE) -> int:
    """States of the optimizer: AdamW keeps two numbers per trained number, in that weight's dtype or in 8 bits.

    DeepSpeed's works on fp32 copies, which count as states.

    Args:
        parameters: What is trained.
        optim: The recipe's `optim`.
        processes: How the run is shared out.

    Returns:
        Bytes.

    Raises:
        InputError: If it is an optimizer that the plan does not know.
    """
    if optim not in STATE_BYTES:
        raise InputError(f"optim is '{optim}', whose memory is not known here; it is for {', '.join(STATE_BYTES)}")
    kind, count = STATE_BYTES[optim]
    numbers = sum(p.numel() for p in parameters)
    if kind == "as weights":
        numbers = 4 * numbers if processes.deepspeed else size(parameters)
    shared = processes.share(numbers) if processes.zero_stage else numbers
    return count * shared + masters(parameters, processes)


def step_buffers(parameters: list[nn.Parameter], optim: str, processes: Processes = ALONE) -> int:
    """What the optimizer needs while it steps: `adamw_torch` works on all tensors at once, with a copy of them.

    Under ZeRO-1 and -2 that takes what gradients took before, which are gone by then, and under ZeRO-3 some of it.

    Args:
        parameters: What is trained.
        optim: The recipe's `optim`.
        processes: How the run is shared out.

    Returns:
        Bytes; 0 for the fused and the 8-bit ones.
    """
    if optim not in ("adamw_torch", "sgd") or (processes.deepspeed and processes.zero_stage < 3):
        return 0
    return processes.share(size(parameters)) if processes.zero_stage else size(parameters)


def kv_cache(config: PreTrainedConfig, rows: int, length: int, bytes_per_number: int) -> int:
    """Keys and values of a generation that grow with its answers (`generation_batches.bytes_per_token`).

    Args:
        config: Of the policy.
        rows: Prompts answered at once.
        length: Prompt and answer, in tokens.
        bytes_per_number: 2 in 16 bit, 4 in fp32.

    Returns:
        Bytes.
    """
    return rows * length * bytes_per_token(config, bytes_per_number)


def without_growth(config: PreTrainedConfig, grown: int) -> int:
    """A static cache: no layer is there twice.

    Args:
        config: Of the policy.
        grown: `kv_cache` of the whole length.

    Returns:
        Bytes.
    """
    layers = config.get_text_config().num_hidden_layers
    return grown * layers // (layers + 1)
