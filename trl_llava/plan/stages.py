"""The models of a stage without their weights, and the worst moments of one of its steps."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from trl.trainer.utils import disable_dropout_in_model

from trl_llava.configs import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.forward.shared_prefix import why_not
from trl_llava.plan.dry_models import add_adapter, build_classifier, build_policy, make_fake
from trl_llava.plan.dry_passes import follow_parts, image_inputs, no_checks, reward_step, sft_step, text_inputs
from trl_llava.plan.memory_model import (
    Moment,
    Processes,
    gradients,
    optimizer_states,
    share,
    step_buffers,
    trained,
    weights,
)
from trl_llava.plan.memory_trace import MemoryTrace
from trl_llava.plan.starts import Sources, base_config, find_start

HELD = "held"


@dataclass(frozen=True)
class Settings:
    """What a search may change.

    Attributes:
        rows: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        checkpointing: `gradient_checkpointing`.
        four_bit: `load_in_4bit`.
        rollout_rows: `local_rollout_forward_batch_size`, for PPO.
    """

    rows: int
    accumulation: int
    checkpointing: bool
    four_bit: bool
    rollout_rows: int | None = None


@dataclass(frozen=True)
class Job:
    """A stage of a recipe.

    Attributes:
        stage: sft, reward or ppo.
        values: Every field of the recipe.
        model_args: Its model fields.
        processes: How it is shared out.
        images: Pictures per row.
        length: L, the longest row in tokens; for PPO the longest prompt.
        sources: Where to look for what an earlier stage has yet to write.
        limit: Bytes of the GPU that there are for tensors; None for a CPU.
        judged_length: Tokens that the reward model of PPO reads of a row; None looks them up.
        shared_length: Tokens that both answers of a pair begin with; None for those of the image.
    """

    stage: str
    values: dict[str, Any]
    model_args: LlavaModelConfig
    processes: Processes
    images: int
    length: int
    sources: Sources = field(default_factory=Sources)
    limit: int | None = None
    judged_length: int | None = None
    shared_length: int | None = None

    @property
    def bf16(self) -> bool:
        """Whether it trains in bf16; TRL does so by default.

        Returns:
            Whether.
        """
        bf16, fp16 = self.values["bf16"], self.values["fp16"]
        return bool(not fp16 if bf16 is None else bf16)

    def given(self, settings: Settings) -> LlavaModelConfig:
        """The model fields with a search's choice of 4 bits.

        Args:
            settings: The choice.

        Returns:
            A copy.
        """
        changed = copy.copy(self.model_args)
        changed.load_in_4bit = settings.four_bit
        changed.load_in_8bit = self.model_args.load_in_8bit and not settings.four_bit
        return changed


@dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        moments: The worst moment of each phase of a step, of one process.
        host: Bytes of the CPU's memory by what they are for, of one process.
        notes: What was decided on the way, and what was taken from elsewhere.
    """

    moments: list[Moment]
    host: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Moment:
        """The phase that decides.

        Returns:
            Its worst moment.
        """
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def totals(self) -> dict[str, int]:
        """What each phase needs.

        Returns:
            Phase -> bytes.
        """
        return {moment.phase: moment.total for moment in self.moments}


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
    model, notes = _trainee(job, settings, start.config)
    held, parameters = weights(model), trained([model])

    def step(trace: MemoryTrace) -> None:
        if job.stage == "reward":
            sizes = (settings.rows, job.images, job.length)
            reward_step(model, start.config, *sizes, shared=_shared(job, model, start.config), bf16=job.bf16)
        else:
            images = image_inputs(start.config, settings.rows * job.images)
            batch = {**text_inputs(settings.rows, job.length), **images}
            sft_step(model, batch, trace, bf16=job.bf16, loss_type=_loss_type(job))

    held["optimizer"] = optimizer_states(parameters, job.values["optim"])
    peak = dry_run([model], step, accumulated=settings.accumulation > 1, processes=job.processes)
    held = share(held, job.processes)
    passes = Moment("forward and backward", held + share(peak, job.processes))
    return Need([passes, optimizer_step(held, parameters, job)], notes=[*start.notes, *notes])


def optimizer_step(held: Counter[str], parameters: list[nn.Parameter], job: Job) -> Moment:
    """The optimizer's step: all gradients are there, and no activations any more.

    Args:
        held: Weights and optimizer states, shared out.
        parameters: What is trained.
        job: The stage.

    Returns:
        The moment.
    """
    here = Counter(gradients=gradients(parameters, job.processes))
    here["optimizer"] += step_buffers(parameters, job.values["optim"])
    return Moment("optimizer step", held + share(here, job.processes))


def dry_run(
    models: list[nn.Module], run: Callable[[MemoryTrace], None], *, accumulated: bool, processes: Processes
) -> Counter[str]:
    """Run something on models without weights.

    Args:
        models: The models, on the meta device; fake afterwards.
        run: What to run.
        accumulated: Whether gradients of an earlier micro-batch are there already; else they come one by one, as
            activations go.
        processes: How the run is shared out: DDP's buckets are there from the first step on.

    Returns:
        Bytes by part at the worst moment, without the weights.
    """
    mode = FakeTensorMode()
    for model in models:
        make_fake(model, mode)
    parameters = trained(models)
    with mode, no_checks(), MemoryTrace() as trace:
        for model in models:
            trace.hold([*model.parameters(), *model.buffers()], HELD)
            follow_parts(model, trace)
        if accumulated:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                trace.hold([parameter.grad], "gradients")
        trace.restart()
        run(trace)
        peak = Counter(trace.at_peak)
    del peak[HELD]
    peak["gradients"] += gradients(parameters, processes) - gradients(parameters, Processes())
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
