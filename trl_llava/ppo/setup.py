"""What a PPO run needs before its first step, beyond what TRL's trainer prepares."""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.errors import ExplainedError, InputError
from trl_llava.models.adapter_role import AdapterRole, computing
from trl_llava.models.adapter_switching import checkpoint_contexts


class UnsupportedLaunchError(ExplainedError, ValueError):
    """A way of launching under which PPO would not train, or would train wrongly."""


def refuse_launches(args: LlavaPPOConfig) -> None:
    """Stop before anything is placed on devices that could not train.

    Args:
        args: the config.

    Raises:
        UnsupportedLaunchError: if the process was launched for FSDP, or to compile the whole model.
    """
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


def honour_max_steps(args: LlavaPPOConfig) -> None:
    """Let `max_steps` decide the length of the run where it is set, as it does in every other trainer.

    Args:
        args: the config; its `total_episodes` is set.
    """
    if args.max_steps > 0:
        rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.total_episodes = args.max_steps * rollouts * PartialState().num_processes


def check_precision(args: LlavaPPOConfig, accelerator: Accelerator) -> None:
    """Stop if an earlier trainer of this process has settled another precision.

    Args:
        args: the config.
        accelerator: the one that was made for it.

    Raises:
        InputError: if the two differ.
    """
    if accelerator.mixed_precision != args.mixed_precision:
        raise InputError(
            f"this process already runs with mixed precision {accelerator.mixed_precision!r}, but the config "
            f"asks for {args.mixed_precision!r}: set `bf16` and `fp16` accordingly, or start a new process"
        )


def prepare_roles(models: list[nn.Module], args: LlavaPPOConfig, accelerator: Accelerator) -> None:
    """Switch off what would make update and rollout differ, and on what the config asks for.

    Args:
        models: policy and value model, before `accelerator.prepare`.
        args: gradient checkpointing and clipping.
        accelerator: the one that will prepare them.

    Raises:
        InputError: if the value model is an adapter on another model, or checkpointing would mix the roles up.
    """
    policy = models[0]
    for model in models:
        if isinstance(model, AdapterRole):
            if model.host is not policy:
                raise InputError(
                    "the value model is an adapter on another model than the policy, so its weights would not be "
                    "trained. Put it on the policy, or pass a PEFT model of its own"
                )
            continue
        # TRL's `disable_dropout_in_model` only finds modules; attention keeps its rate in an attribute.
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        compile_layers(model, args)
        if args.gradient_checkpointing:
            shared = any(isinstance(other, AdapterRole) for other in models)
            model.activation_checkpointing_enable(**_checkpointing(model, args.gradient_checkpointing_kwargs, shared))
    if (plugin := getattr(accelerator.state, "deepspeed_plugin", None)) is not None:
        # DeepSpeed clips by itself; left at "auto" it would clip at 1.
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm or 0.0


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

    Args:
        policy: the policy.
        args: `tf32` and `generation_cache_gib`.
        accelerator: knows device and precision of passes.

    Returns:
        `False` in 16 bit, with tf32, and on a quantised base, whose rounding depends on what else is in the batch; and
        where free memory says how many prompts run at once, which a resumed run may find otherwise.
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

    Args:
        model: a role, or a PEFT model around one.
        args: `torch_compile`, `torch_compile_backend`, `torch_compile_mode` and `gradient_checkpointing`.
    """
    if not args.torch_compile:
        return
    with computing(model) as base:
        backbone = getattr(base, base.base_model_prefix)
    for layer in getattr(backbone, "language_model", backbone).layers:
        for part in layer.children() if args.gradient_checkpointing else (layer,):
            if part._compiled_call_impl is None:  # roles may share their layers
                part.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def warm_up_above_zero(scheduler: LRScheduler, warmup_steps: int) -> None:
    """Let the first step of a warm-up train too: its rate is `1 / (warmup_steps + 1)` of the peak instead of 0.

    transformers' warm-ups give step `k` the share `(k - 1) / warmup_steps`, so that a PPO run would throw its first
    rollout away; ours is `k / (warmup_steps + 1)`. From step `warmup_steps + 1` on, the peak, nothing changes.

    Args:
        scheduler: the schedule of one of transformers' `lr_scheduler_type`s, before its first step.
        warmup_steps: length of the warm-up; 0 changes nothing.
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
