"""The models of a stage without their weights, and the worst moments of one of its steps."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from trl.trainer.utils import disable_dropout_in_model

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.models.shared_prefix import why_not
from trl_llava.tools.plan.dry_models import add_adapter, build_classifier, build_policy, make_fake
from trl_llava.tools.plan.dry_passes import follow_parts, image_inputs, linear_as_it_runs, no_checks, text_inputs
from trl_llava.tools.plan.dry_steps import reward_step, sft_step
from trl_llava.tools.plan.job import Job, Need, Settings
from trl_llava.tools.plan.memory_model import Moment, optimizer_states, step_buffers, trained, weights
from trl_llava.tools.plan.memory_trace import MemoryTrace
from trl_llava.tools.plan.sharing import (
    Processes,
    cast_as_deepspeed,
    gathered,
    gradients_at_the_step,
    gradients_backwards,
    gradients_between_steps,
)
from trl_llava.tools.plan.starts import base_config, find_start

HELD = "held"


def supervised_need(job: Job, settings: Settings) -> Need:
    """What a step of SFT or of the reward model needs.

    Args:
        job: The stage.
        settings: The settings.

    Returns:
        Moments of the passes and of the optimizer's step.

    Raises:
        InputError: If a model or an optimizer is of a kind that the plan does not know.
        NotFoundError: If the config of a model cannot be read.
    """
    start = base_config(job.model_args, job.sources)
    job = replace(job, processes=job.processes.for_width(start.config.get_text_config().hidden_size))
    model, notes = _trainee(job, settings, start.config)
    cast_as_deepspeed([model], job.processes, job.bf16)
    held, parameters = weights(model, job.processes), trained([model])

    def step(trace: MemoryTrace) -> None:
        if job.stage == "reward":
            sizes = (settings.rows, job.images, job.length)
            reward_step(model, start.config, *sizes, shared=_shared(job, model, start.config), bf16=job.autocast)
        else:
            images = image_inputs(start.config, settings.rows * job.images)
            batch = {**text_inputs(settings.rows, job.length), **images}
            sft_step(model, batch, trace, bf16=job.autocast, loss_type=_loss_type(job))

    held += between_steps(parameters, job)
    peak = dry_run([model], step, accumulated=settings.accumulation > 1, processes=job.processes)
    passes = Moment("forward and backward", held + peak)
    return Need([passes, optimizer_step(held, parameters, job)], notes=[*start.notes, *notes])


def between_steps(parameters: list[nn.Parameter], job: Job) -> Counter[str]:
    """What is there all the time besides weights.

    Args:
        parameters: What is trained.
        job: The stage.

    Returns:
        Bytes by part.
    """
    states = optimizer_states(parameters, job.values["optim"], job.processes)
    return Counter(optimizer=states, gradients=gradients_between_steps(parameters, job.processes))


def optimizer_step(held: Counter[str], parameters: list[nn.Parameter], job: Job) -> Moment:
    """The optimizer's step: all gradients are there, and no activations any more.

    Args:
        held: Weights, optimizer states and what else is there all the time.
        parameters: What is trained.
        job: The stage.

    Returns:
        The moment.
    """
    here = Counter(gradients=gradients_at_the_step(parameters, job.processes))
    here["optimizer"] = step_buffers(parameters, job.values["optim"], job.processes)
    return Moment("optimizer step", held + here)


def dry_run(
    models: list[nn.Module], run: Callable[[MemoryTrace], None], *, accumulated: bool, processes: Processes
) -> Counter[str]:
    """Run something on models without weights.

    Args:
        models: The models, on the meta device; fake afterwards.
        run: What to run.
        accumulated: Whether gradients of an earlier micro-batch are there already; else they come one by one, as
            activations go.
        processes: How the run is shared out. ZeRO-2 and -3 let no gradient wait for a later micro-batch.

    Returns:
        Bytes by part at the worst moment, without what is there all the time.
    """
    mode = FakeTensorMode()
    for model in models:
        make_fake(model, mode)
    parameters = trained(models)
    taken = processes.deepspeed and processes.zero_stage > 1
    with mode, no_checks(), linear_as_it_runs(processes), MemoryTrace() as trace:
        for model in models:
            trace.hold([*model.parameters(), *model.buffers()], HELD)
            follow_parts(model, trace, gradients_taken=taken)
        if accumulated and not taken:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                trace.hold([parameter.grad], "gradients")
        trace.restart()
        run(trace)
        peak = Counter(trace.at_peak)
    del peak[HELD]
    if processes.fsdp:
        peak["gradients"] = processes.share(peak["gradients"])
    peak["gradients"] += gradients_backwards(parameters, processes, accumulated=accumulated)
    peak["gathered weights"] += gathered(models, processes)
    return peak


def _trainee(job: Job, settings: Settings, config: PreTrainedConfig) -> tuple[nn.Module, list[str]]:
    """The model of a stage as its trainer trains it, on the meta device, and where its adapter's shape is from."""
    args, adapter, notes = job.given(settings), None, []
    if args.adapter_name_or_path is not None:
        name, revision = args.adapter_name_or_path, args.adapter_revision
        start = find_start("adapter_name_or_path", name, revision, job.sources, args, args.model_name_or_path)
        args, adapter, notes = shaped(args, start.shape), start.adapter, [*start.notes]
    classifier = job.stage == "reward"
    model = build_classifier(config, args) if classifier else build_policy(config, args)
    task = "SEQ_CLS" if classifier else "CAUSAL_LM"
    model = add_adapter(model, args, task=task, trained=adapter)
    if args.load_in_4bit or args.load_in_8bit:  # TRL keeps the adapters of a quantised model in bf16
        for parameter in trained([model]):
            parameter.data = parameter.data.to(torch.bfloat16)
    if job.values.get("disable_dropout"):
        disable_dropout_in_model(model)
    return prepare(model, settings, job.values["gradient_checkpointing_kwargs"]), notes


def shaped(args: LlavaModelConfig, shape: LlavaModelConfig | None) -> LlavaModelConfig:
    """Model fields with the adapter of another recipe.

    Args:
        args: The recipe's.
        shape: Those whose `lora_*` count; None for its own.

    Returns:
        A copy, or `args`.
    """
    if shape is None:
        return args
    changed = copy.copy(args)
    for name in vars(shape):
        if name.startswith(("lora_", "use_peft", "use_dora", "use_rslora")):
            setattr(changed, name, getattr(shape, name))
    return changed


def prepare(model: nn.Module, settings: Settings, checkpointing: dict[str, Any] | None) -> nn.Module:
    """What TRL does to a model before it trains.

    Args:
        model: The model.
        settings: Whether activations are computed again in the backward pass.
        checkpointing: `gradient_checkpointing_kwargs`.

    Returns:
        The model, in train mode.

    Raises:
        InputError: If activations are kept in CPU memory, which no formula here knows.
    """
    if settings.checkpointing:
        given = dict(checkpointing or {})
        if given.pop("offload", False):
            raise InputError("gradient_checkpointing_kwargs: what `offload` takes is not known here; plan without it")
        every = given.pop("every_n_layers", 1)
        model.activation_checkpointing_enable(given or None, every_n_layers=every)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    return model.train()


def _shared(job: Job, model: nn.Module, config: PreTrainedConfig) -> int:
    """How many tokens of a pair run once; 0 where both answers run whole."""
    if not job.values["share_prefix"] or why_not(model) is not None:
        return 0
    image_tokens = job.images * (getattr(config, "image_seq_length", None) or 0)
    return max(1, min(image_tokens if job.shared_length is None else job.shared_length, job.length - 1))


def _loss_type(job: Job) -> str:
    if job.values["use_liger_kernel"]:
        raise InputError("use_liger_kernel: the memory of liger's kernels is not known here; plan without it")
    return job.values["loss_type"] or "chunked_nll"
