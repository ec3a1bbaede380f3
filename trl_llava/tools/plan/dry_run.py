"""A dry run: a trainer's code on models without memory, under a trace that tells the bytes of each part."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES
from trl_llava.tools.plan.formulas import gathered, gradients_backwards, trained
from trl_llava.tools.plan.memory_trace import MemoryTrace
from trl_llava.tools.plan.no_memory import NoMemory
from trl_llava.tools.plan.processes import Processes

HELD = "held"


def dry_run(
    models: Sequence[nn.Module],
    run: Callable[[], Any],
    without_memory: NoMemory,
    processes: Processes,
    *,
    accumulated: bool,
    batch: dict[str, Any] | None = None,
) -> Counter[str]:
    """Bytes by part at the worst moment of a run over a batch, without what is there all the time.

    `accumulated`: gradients of an earlier micro-batch are there already; else they come one by one, as activations go.
    ZeRO-2 and -3 let no gradient wait for a later micro-batch.
    """
    parameters = trained(models)
    taken = processes.deepspeed and processes.zero_stage > 1
    with ExitStack() as stack:
        stack.enter_context(_as_on_a_gpu(processes))
        stack.enter_context(without_memory)
        trace = stack.enter_context(MemoryTrace())
        for model in models:
            trace.hold([*model.parameters(), *model.buffers()], HELD)
            stack.enter_context(_told_apart(model, trace, gradients_taken=taken))
        for parameter in parameters:
            parameter.grad = None
            if accumulated and not taken:
                parameter.grad = torch.empty_like(parameter)
                trace.hold([parameter.grad], "gradients")
        trace.hold([value for value in (batch or {}).values() if isinstance(value, torch.Tensor)], "activations")
        trace.restart()
        run()
        peak = Counter(trace.at_peak)
    for parameter in parameters:
        parameter.grad = None
    del peak[HELD]
    if processes.fsdp:
        peak["gradients"] = processes.share(peak["gradients"])
    peak["gradients"] += gradients_backwards(parameters, processes, accumulated=accumulated)
    peak["gathered weights"] += gathered(models, processes)
    return peak


@contextmanager
def _told_apart(model: nn.Module, trace: MemoryTrace, *, gradients_taken: bool) -> Iterator[None]:
    """Count tower and projector, logits, and gradients as parts of their own.

    `gradients_taken`: each gradient is taken away as soon as it is there.
    """

    def follow(part: str) -> Callable[..., None]:
        return lambda *_: setattr(trace, "part", part)

    def to_the_head(backbone: nn.Module, args: Any, output: Any) -> None:
        trace.part = "logits"
        if output.last_hidden_state.requires_grad:  # its gradient is the last thing that is made of the logits
            output.last_hidden_state.register_hook(follow("activations"))

    def keep(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        trace.hold([parameter.grad], "gradients")

    def take(parameter: torch.Tensor) -> None:
        parameter.grad = None

    base, handles = base_of(model), []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in {*TOWER_NAMES, *PROJECTOR_NAMES}:
            handles.append(module.register_forward_pre_hook(follow("image features")))
            handles.append(module.register_forward_hook(follow("activations")))
    if (head := base.get_output_embeddings()) is not None:
        backbone = backbone_of(base)
        handles.append(backbone.register_forward_pre_hook(follow("activations")))
        handles.append(backbone.register_forward_hook(to_the_head))
        handles.append(head.register_forward_pre_hook(follow("logits")))  # which runs again in the backward pass
    for parameter in trained([model]):
        handles.append(parameter.register_post_accumulate_grad_hook(take if gradients_taken else keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as_on_a_gpu(processes: Processes) -> Iterator[None]:
    """Run what a CPU with real numbers would run otherwise."""
    with ExitStack() as stack:
        # A trace sees inside of attention only where autograd does; for memory both are the same.
        no_grad = patch("torch.inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        stack.enter_context(no_grad)
        # transformers compares numbers of image tokens, which tensors without memory do not have.
        stack.enter_context(patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"))
        if processes.deepspeed and processes.zero_stage == 3:
            stack.enter_context(patch("torch.nn.functional.linear", _Linear.apply))
        if find_spec("trl.kernels") is not None:  # on a GPU a kernel folds a tile of logits where it lies
            for name in ("_forward_tile", "_backward_tile"):
                stack.enter_context(patch(f"trl.kernels.chunked_logprob.{name}", lambda *args, **kwargs: None))
        yield


class _Linear(torch.autograd.Function):
    """DeepSpeed's linear layer under ZeRO-3: it keeps its input for the backward pass, a frozen one too."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(input, weight, bias)
        output = input @ weight.t()
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        needs, flat = ctx.needs_input_grad, gradient.flatten(0, -2)
        return (
            gradient @ weight if needs[0] else None,
            flat.t() @ input.flatten(0, -2) if needs[1] else None,
            flat.sum(0) if len(needs) > 2 and needs[2] else None,
        )
