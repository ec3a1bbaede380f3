"""The models of a stage without their weights, and the worst moments of one of its steps."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from trl.trainer.utils import disable_dropout_in_model

from trl_llava.configs import LlavaModelConfig
from trl_llava.dry_models import add_adapter, build_classifier, build_policy, make_fake
from trl_llava.dry_passes import follow_parts, image_inputs, no_checks, reward_step, sft_step, text_inputs
from trl_llava.errors import InputError
from trl_llava.memory_model import (
    Moment,
    Processes,
    gradients,
    optimizer_states,
    share,
    step_buffers,
    trained,
    weights,
)
from trl_llava.memory_trace import MemoryTrace
from trl_llava.models import load_config
from trl_llava.shared_prefix import why_not

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
        fallback: Base model of what an earlier stage has yet to write.
        judged_length: Tokens that the reward model of PPO reads of a row.
        shared_length: Tokens that both answers of a pair begin with; None for those of the image.
    """

    stage: str
    values: dict[str, Any]
    model_args: LlavaModelConfig
    processes: Processes
    images: int
    length: int
    fallback: str | None = None
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


def supervised_moments(job: Job, settings: Settings) -> list[Moment]:
    """The worst moment of each phase of a step of SFT or of the reward model, of one process.

    Args:
        job: The stage.
        settings: The settings.

    Returns:
        A moment for each phase.

    Raises:
        InputError: If a model or an optimizer is of a kind that the plan does not know.
    """
    config = load_config(
        "model_name_or_path",
        job.model_args.model_name_or_path,
        job.model_args.model_revision,
        job.model_args.trust_remote_code,
    )
    model = _trainee(job, settings, config)

    def step(trace: MemoryTrace) -> None:
        if job.stage == "reward":
            sizes = (settings.rows, job.images, job.length)
            reward_step(model, config, *sizes, shared=_shared(job, model, config), bf16=job.bf16)
        else:
            images = image_inputs(config, settings.rows * job.images)
            batch = {**text_inputs(settings.rows, job.length), **images}
            sft_step(model, batch, trace, bf16=job.bf16, loss_type=_loss_type(job))

    held = weights(model) + Counter(optimizer=optimizer_states(trained([model]), job.values["optim"]))
    peak = dry_run([model], step, accumulated=settings.accumulation > 1, processes=job.processes)
    return [
        Moment("forward and backward", share(held + peak, job.processes)),
        optimizer_step(held, trained([model]), job),
    ]


def optimizer_step(held: Counter[str], parameters: list[nn.Parameter], job: Job) -> Moment:
    """The optimizer's step: all gradients are there, and no activations any more.

    Args:
        held: Weights and optimizer states.
        parameters: What is trained.
        job: The stage.

    Returns:
        The moment.
    """
    here = Counter(gradients=gradients(parameters, job.processes))
    here["optimizer"] += step_buffers(parameters, job.values["optim"])
    return Moment("optimizer step", share(held + here, job.processes))


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


def _trainee(job: Job, settings: Settings, config: PreTrainedConfig) -> nn.Module:
    """The model of SFT or of the reward stage as its trainer trains it, on the meta device."""
    args = job.given(settings)
    trained_adapter = None
    if args.adapter_name_or_path is not None:
        trained_adapter = PeftConfig.from_pretrained(args.adapter_name_or_path, revision=args.adapter_revision)
    if job.stage == "reward":
        model = add_adapter(build_classifier(config, args), args, task="SEQ_CLS", trained=trained_adapter)
    else:
        model = add_adapter(build_policy(config, args), args, task="CAUSAL_LM", trained=trained_adapter)
    if args.load_in_4bit or args.load_in_8bit:  # TRL keeps the adapters of a quantised model in bf16
        for parameter in trained([model]):
            parameter.data = parameter.data.to(torch.bfloat16)
    if job.values.get("disable_dropout"):
        disable_dropout_in_model(model)
    return prepare(model, settings, job.values["gradient_checkpointing_kwargs"])


def prepare(model: nn.Module, settings: Settings, checkpointing: dict[str, Any] | None) -> nn.Module:
    """What TRL does to a model before it trains.

    Args:
        model: The model.
        settings: Whether activations are computed again in the backward pass.
        checkpointing: `gradient_checkpointing_kwargs`.

    Returns:
        The model, in train mode.
    """
    if settings.checkpointing:
        model.gradient_checkpointing_enable(checkpointing or {"use_reentrant": False})
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
