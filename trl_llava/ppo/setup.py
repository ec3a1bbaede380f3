"""What a PPO run needs before its first step, beyond what TRL's trainer prepares."""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from trl.trainer.utils import disable_dropout_in_model

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.errors import ExplainedError, InputError
from trl_llava.models.adapter_role import AdapterRole, computing
from trl_llava.models.adapter_switching import checkpoint_contexts
from trl_llava.models.base_model import backbone_of


class UnsupportedLaunchError(ExplainedError, ValueError):
    """A way of launching under which PPO would not train, or would train wrongly."""


def refuse_launches(args: LlavaPPOConfig) -> None:
    """Refuse FSDP, and accelerate's compilation of whole models, before anything is placed on devices."""
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" and not args.torch_compile:
        raise UnsupportedLaunchError(
            "LlavaPPOTrainer does not run with accelerate's `dynamo_backend`: it would compile policy and value model "
            "as one, anew for every shape of a rollout. Leave it at 'no', and set `torch_compile: true` in the "
            "recipe, which compiles their layers"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UnsupportedLaunchError(
            "LlavaPPOTrainer does not run under FSDP: a rollout uses policy and value model one by one, and FSDP "
            "gathers only the two together. Use DDP, ZeRO-2 or ZeRO-3 (`--accelerate_config ddp`, `zero2` or `zero3`)"
        )


def compute_batch_sizes(args: LlavaPPOConfig, completions_per_epoch: int, num_processes: int) -> None:
    """Fill in the fields that follow from others, as TRL 1.12's `PPOTrainer` does."""
    args.world_size = num_processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * num_processes
    args.batch_size = args.local_batch_size * num_processes
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    args.mini_batch_size = args.local_mini_batch_size * num_processes
    if args.max_steps > 0:  # as in every other trainer, it decides the length of the run
        args.total_episodes = args.max_steps * args.batch_size
    elif args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * completions_per_epoch)
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)


def prepare_roles(
    policy: nn.Module, value_model: nn.Module, ref_model: nn.Module | None, args: LlavaPPOConfig
) -> None:
    """Switch off what would make update and rollout differ, and on what the config asks for."""
    if isinstance(value_model, AdapterRole) and value_model.host is not policy:
        raise InputError(
            "the value model is an adapter on another model than the policy, so its weights would not be "
            "trained. Put it on the policy, or pass a PEFT model of its own"
        )
    roles = [policy, *([] if isinstance(value_model, AdapterRole) else [value_model])]
    roles += [] if ref_model is None else [ref_model]
    for model in roles:
        disable_dropout_in_model(model)
        for module in model.modules():  # TRL's function only finds modules; attention keeps its rate in an attribute
            for name in ("attention_dropout", "dropout"):  # CLIP's has the second name
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        compile_layers(model, args)
        if args.gradient_checkpointing and model is not ref_model:
            shared = isinstance(value_model, AdapterRole)
            kwargs = _checkpointing(model, args.gradient_checkpointing_kwargs, shared)
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(**kwargs)
            elif len(kwargs) > 1:
                unknown = ", ".join(name for name in kwargs if name != "activation_checkpointing_kwargs")
                raise InputError(
                    f"`gradient_checkpointing_kwargs`: this transformers has no {unknown}: install a newer one"
                )
            else:  # transformers 5.16 and 5.17, which vLLM needs
                model.gradient_checkpointing_enable(kwargs["activation_checkpointing_kwargs"])


def _checkpointing(model: nn.Module, given: dict[str, Any] | None, shared: bool) -> dict[str, Any]:
    """The keyword arguments of checkpointing, under which each role's pass is repeated as that role."""
    kwargs = {"use_reentrant": False, **(given or {})}
    # These two are transformers' own, the others torch's; its Trainer takes them apart too.
    own: dict[str, Any] = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    if shared and kwargs["use_reentrant"]:
        raise InputError(
            "`gradient_checkpointing_kwargs: {use_reentrant: true}` would repeat the value model's passes as the "
            "policy where they share a base: leave it out, or set `share_base: false`"
        )
    if isinstance(model, PeftModel) and not kwargs["use_reentrant"]:
        kwargs.setdefault("context_fn", checkpoint_contexts(model))
    return {"activation_checkpointing_kwargs": kwargs, **own}


def rounds_alike(policy: nn.Module, args: LlavaPPOConfig, accelerator: Accelerator) -> bool:
    """Whether generation and training passes give a token the same log-probability, but for float32's last digits.

    Not in 16 bit, with tf32, and on a quantised base, whose rounding depends on what else is in the batch; and not
    where free memory decides how many prompts run at once, since a resumed run may find another amount.
    """
    in_float32 = accelerator.mixed_precision == "no" and policy.dtype == torch.float32
    same_batches = accelerator.device.type == "cpu" or args.generation_cache_gib is not None
    return in_float32 and same_batches and not args.tf32 and not getattr(policy, "is_quantized", False)


def compile_layers(model: nn.Module, args: LlavaPPOConfig) -> None:
    """Compile the layers of a model's language model, one by one and in place, where `torch_compile` is set.

    Trainer would compile policy and value model as one, anew for every shape of a rollout; all layers of a model share
    what is compiled for one of them. Names of weights stay as they are, and so does the tower.

    With gradient checkpointing, a layer's attention, MLP and norms are compiled one by one: transformers checkpoints
    inside a layer, and torch compiles no checkpointing whose recomputation has to switch to the role of its forward.
    """
    if not args.torch_compile:
        return
    with computing(model) as base:
        backbone = backbone_of(base)
    for layer in backbone.get_decoder().layers:
        for part in layer.children() if args.gradient_checkpointing else (layer,):
            if part._compiled_call_impl is None:  # roles may share their layers
                part.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def warm_up_above_zero(scheduler: LRScheduler, warmup_steps: int) -> None:
    """Let the first step of a warm-up train too: its rate is `1 / (warmup_steps + 1)` of the peak instead of 0.

    transformers' warm-ups give step `k` the share `(k - 1) / warmup_steps`, so that a PPO run would throw its first
    rollout away; ours is `k / (warmup_steps + 1)`. From step `warmup_steps + 1` on, the peak, nothing changes.
    """
    if warmup_steps == 0 or not isinstance(scheduler, LambdaLR):
        return

    def raised(share: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / (warmup_steps + 1) if step < warmup_steps else share(step)

    scheduler.lr_lambdas = [raised(share) for share in scheduler.lr_lambdas]
    rates = [base * share(0) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # what `get_last_lr` returns until the first step
