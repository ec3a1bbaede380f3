"""Flex attention, flash attention and liger's kernels: refused where they cannot work.

transformers applies liger's kernels in SFT and reward training; PPO's trainer has to.
"""

import logging
from collections.abc import Iterable
from importlib import import_module

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_liger_kernel_available

from trl_llava.errors import InputError, MissingPackageError
from trl_llava.models.adapter_role import host_of
from trl_llava.models.base_model import base_of


def check_gpu_kernels(args: TrainingArguments, attn_implementation: str | None) -> None:
    """Refuse what cannot work on this machine, before anything is loaded."""
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
    if getattr(args, "activation_offloading", False) and on_cpu:
        raise InputError("`activation_offloading: true` needs a GPU, and this run is on the CPU: leave it out")
    if args.use_liger_kernel and on_cpu:
        raise InputError(
            "`use_liger_kernel: true` needs a GPU, and this run is on the CPU: leave it out. It changes no result"
        )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise MissingPackageError(
            "`use_liger_kernel: true` needs liger-kernel 0.3 or later, which is not installed: "
            "`pip install liger-kernel`"
        )
    if args.use_liger_kernel:
        logging.getLogger("liger_kernel.backends.registry").addFilter(_is_no_missing_backend)


def _is_no_missing_backend(record: logging.LogRecord) -> bool:
    """Keep out what liger says, with the error of each import, of kernels in languages that are not installed."""
    return "could not be imported" not in str(record.msg)


def choose_attention_kernels(cudnn_attention: bool) -> None:
    """Keep sdpa off cuDNN in this process, unless the recipe asks for it.

    PyTorch prefers cuDNN for sdpa with a mask on Hopper and Blackwell, and cuDNN makes a plan for every new shape:
    about a second, forward and backward, for each batch length and each token of a growing cache.
    """
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def check_liger_knows(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a model that liger has no kernels for; transformers would only log it, and change nothing."""
    if not args.use_liger_kernel:
        return
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    base = base_of(host_of(model))
    if base.config.model_type not in known:
        raise InputError(
            f"`use_liger_kernel: true`: liger-kernel has no kernels for {base.config.model_type} models "
            f"({type(base).__name__}): leave it out. It knows {', '.join(sorted(known))}"
        )


def apply_liger(models: Iterable[nn.Module | None], args: TrainingArguments) -> None:
    """Put liger's kernels into loaded models as transformers' trainer does, each base once; what is no model stays."""
    if not args.use_liger_kernel:
        return
    for base in {base_of(host_of(model)): None for model in models if isinstance(model, nn.Module)}:
        check_liger_knows(base, args)
        apply_liger_kernel(base, args.liger_kernel_config)
