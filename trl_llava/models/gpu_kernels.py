"""What a recipe may ask of a GPU, flex attention and liger's kernels: refused where it cannot work.

transformers applies liger's kernels in SFT and reward training; PPO's trainer has to. Neither was run on a GPU.
"""

from collections.abc import Iterable
from importlib import import_module

from torch import nn
from transformers import TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_liger_kernel_available

from trl_llava.errors import InputError, MissingPackageError
from trl_llava.models.adapter_role import AdapterRole
from trl_llava.models.base_model import base_of


def check_gpu_kernels(args: TrainingArguments, attn_implementation: str | None) -> None:
    """Refuse what cannot work on this machine, before anything is loaded.

    Args:
        args: `use_liger_kernel`, and the device of the run.
        attn_implementation: Of all models.

    Raises:
        InputError: If it needs a GPU, and the run is on the CPU, or there is no such attention.
        MissingPackageError: If liger-kernel is not installed.
    """
    known = ("eager", *(name for name in ALL_ATTENTION_FUNCTIONS if "|" not in name))  # no `paged|eager`
    wanted = attn_implementation or known[0]
    if wanted not in known and "/" not in wanted:  # with a slash it would be one on the Hub
        raise InputError(f"`attn_implementation`: {wanted!r} is none of {', '.join(known)}")
    on_cpu = args.device.type == "cpu"
    if attn_implementation == "flex_attention" and on_cpu:
        raise InputError(
            "`attn_implementation: flex_attention` cannot train on the CPU, where torch has no backward pass for it. "
            "Use sdpa, or a GPU"
        )
    if str(attn_implementation).startswith("flash_attention") and on_cpu:
        raise InputError(
            f"`attn_implementation: {attn_implementation}` needs a GPU, and this run is on the CPU: use sdpa"
        )
    if args.use_liger_kernel and on_cpu:
        raise InputError(
            "`use_liger_kernel: true` needs a GPU, and this run is on the CPU: leave it out. It changes no result"
        )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise MissingPackageError(
            "`use_liger_kernel: true` needs liger-kernel 0.3 or later, which is not installed: "
            "`pip install liger-kernel`"
        )


def check_liger_knows(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a model that liger has no kernels for; it would only be logged, and nothing done.

    Args:
        model: The model that is trained.
        args: `use_liger_kernel`.

    Raises:
        InputError: If liger's table has no such model.
    """
    if not args.use_liger_kernel:
        return
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    base = _base(model)
    if base.config.model_type not in known:
        raise InputError(
            f"`use_liger_kernel: true`: liger-kernel has no kernels for {base.config.model_type} models "
            f"({type(base).__name__}): leave it out. It knows {', '.join(sorted(known))}"
        )


def apply_liger(models: Iterable[nn.Module | None], args: TrainingArguments) -> None:
    """Put liger's kernels into loaded models as transformers' trainer does, each base once, heads left alone.

    Args:
        models: Models, PEFT models around them, or roles on another model's base; what is no model is left out.
        args: `use_liger_kernel`, and `liger_kernel_config` as `keep_heads` leaves it.

    Raises:
        InputError: If liger's table has no such model.
    """
    if not args.use_liger_kernel:
        return
    bases = {id(base): base for base in map(_base, filter(_is_model, models))}
    for base in bases.values():
        check_liger_knows(base, args)
        apply_liger_kernel(base, args.liger_kernel_config)


def _is_model(model: nn.Module | None) -> bool:
    return isinstance(model, nn.Module)


def _base(model: nn.Module) -> nn.Module:
    host = model.host if isinstance(model, AdapterRole) else model
    return base_of(host)
