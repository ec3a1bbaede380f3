"""What the passes of a PPO step compute, on fake tensors, and what all dry runs take and watch.

Letters: `B` batch, `L` sequence, `V` vocabulary, `H` hidden, `I` images, `N` image tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedConfig, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trl_llava.models.base_model import base_of
from trl_llava.models.chunked_head import Sampling, token_statistics
from trl_llava.models.shared_prefix import attention_mask_for
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES
from trl_llava.tools.plan.memory_trace import MemoryTrace
from trl_llava.tools.plan.sharing import Processes


def image_inputs(config: PreTrainedConfig, images: int) -> dict[str, Any]:
    """What an image processor makes of I pictures, at the size at which they take the most.

    Args:
        config: Of the model.
        images: I.

    Returns:
        `pixel_values` (I, 3, size, size); for the families that tile (I, tiles + 1, 3, size, size), and `image_sizes`,
            the largest grid I times; lists, because the models read them as numbers, which fake tensors do not have.
    """
    size = config.vision_config.image_size
    grids = getattr(config, "image_grid_pinpoints", None)
    if not grids:
        return {"pixel_values": torch.empty(images, 3, size, size)}
    height, width = max(grids, key=lambda grid: grid[0] * grid[1])
    tiles = 1 + (height // size) * (width // size)
    pixels = torch.empty(images, tiles, 3, size, size)
    return {"pixel_values": pixels, "image_sizes": [[height, width]] * images}


def text_inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of B rows of L tokens.

    Args:
        rows: B.
        length: L, image tokens included.

    Returns:
        `input_ids` and `attention_mask`, (B, L) long.
    """
    return {name: torch.ones(rows, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}


@contextmanager
def no_checks() -> Iterator[None]:
    """Keep transformers from comparing numbers of image tokens, which fake tensors do not have.

    Yields:
        Nothing.
    """
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def autocast(bf16: bool) -> Any:
    """What `accelerate` puts around a forward pass.

    Args:
        bf16: Whether the recipe trains in bf16.

    Returns:
        A context.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def linear_as_it_runs(processes: Processes) -> Iterator[None]:
    """Under ZeRO-3, DeepSpeed's linear layers keep their input for the backward pass, frozen ones too.

    Args:
        processes: How the run is shared out.

    Yields:
        Nothing.
    """
    if not processes.deepspeed or processes.zero_stage < 3:
        yield
        return
    with patch("torch.nn.functional.linear", _Linear.apply):
        yield


class _Linear(torch.autograd.Function):
    """DeepSpeed's `LinearFunctionForZeroStage3`, as far as it decides what is in memory."""

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


def follow_parts(model: nn.Module, trace: MemoryTrace, *, gradients_taken: bool) -> None:
    """Count what is made inside of tower and projector, and what becomes a gradient, as parts of their own.

    Args:
        model: The model that will run.
        trace: The trace that it will run under.
        gradients_taken: Whether each gradient is taken away as soon as it is there.
    """

    def keep(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        trace.hold([parameter.grad], "gradients")

    def take(parameter: torch.Tensor) -> None:
        parameter.grad = None

    seeing = {*TOWER_NAMES, *PROJECTOR_NAMES}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in seeing:
            module.register_forward_pre_hook(lambda *_: setattr(trace, "part", "image features"))
            module.register_forward_hook(lambda *_: setattr(trace, "part", "activations"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take if gradients_taken else keep)


def encode(model: nn.Module, config: PreTrainedConfig, images: int) -> list[torch.Tensor]:
    """Tower and projector over I pictures, without gradients and without autocast, as `image_features` runs them.

    Args:
        model: The model.
        config: Its configuration.
        images: I.

    Returns:
        The features, (N, H) each.
    """
    backbone = _backbone(model)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        inputs = image_inputs(config, images)
        inputs["pixel_values"] = inputs["pixel_values"].to(backbone.dtype)
        return list(backbone.get_image_features(**inputs, return_dict=True).pooler_output)


def prefill(
    model: nn.Module, rows: int, length: int, seen: dict[str, Any], *, bf16: bool, static: int | None = None
) -> torch.dtype:
    """The pass over the prompts that a generation begins with.

    Args:
        model: The policy.
        rows: B.
        length: Q, the padded length of the prompts.
        seen: Images, as `images_as`.
        bf16: Whether it runs under autocast.
        static: Tokens that the cache has room for from the start; None for one that grows.

    Returns:
        The dtype of keys and values.
    """
    base = base_of(model)
    with torch.no_grad(), autocast(bf16):
        if static is not None:
            text = base.config.get_text_config(decoder=True)
            seen = {**seen, "past_key_values": StaticCache(config=text, max_cache_len=static)}
        output = base(**text_inputs(rows, length), **seen, use_cache=True, logits_to_keep=1)
        output.logits.float().softmax(-1)
        return output.past_key_values.layers[0].keys.dtype


def response_states(model: nn.Module, rows: int, length: int, answer: int, seen: dict[str, Any]) -> torch.Tensor:
    """The hidden states that responses are predicted from, as `passes.response_logprobs` takes them, without padding.

    Args:
        model: Policy or value model.
        rows: B.
        length: Q + R.
        answer: R.
        seen: Images, as `images_as`.

    Returns:
        (B * R, H).
    """
    # Rows stand at the left, and the model asks for no mask (`passes._left_aligned`).
    ids = torch.ones(rows, length, dtype=torch.long)
    # transformers looks for packed rows in position ids, which fake tensors do not have, and would make a mask.
    with patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None):
        hidden = _backbone(model)(input_ids=ids, **seen, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[torch.zeros(rows * answer, dtype=torch.long)]


def packed_states(model: nn.Module, prompts: int, length: int, answers: int, seen: dict[str, Any]) -> torch.Tensor:
    """As `response_states`, where all answers to a prompt run behind it as one row, under a 4D mask.

    Args:
        model: Policy or value model.
        prompts: Number of prompts.
        length: Q.
        answers: Tokens of all answers to a prompt together.
        seen: Images of each prompt once, as `images_as`.

    Returns:
        (prompts * answers, H).
    """
    backbone = _backbone(model)
    batch = text_inputs(prompts, length + answers)
    segments = torch.ones_like(batch["input_ids"])
    mask = attention_mask_for(backbone, segments)
    hidden = backbone(
        **seen, input_ids=batch["input_ids"], attention_mask=mask, position_ids=segments, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[torch.zeros(prompts * answers, dtype=torch.long)]


def ask_policy(model: nn.Module, states: torch.Tensor, sampling: Sampling, trace: MemoryTrace) -> torch.Tensor:
    """Log-probabilities and entropies, the head a chunk of positions at a time.

    Args:
        model: The policy.
        states: (n, H).
        sampling: The chunk.
        trace: Follows the bytes.

    Returns:
        (n,) log-probabilities.
    """
    base = base_of(model)
    tokens = torch.zeros(len(states), dtype=torch.long)
    with trace.counting_as("logits"):
        return token_statistics(states, base.get_output_embeddings(), tokens, sampling, entropies=True)[0]


def images_as(features: list[torch.Tensor] | None, config: PreTrainedConfig, images: int) -> dict[str, Any]:
    """Pictures as a forward pass takes them.

    Args:
        features: What has been encoded; None where tower or projector are trained, which then run in every pass.
        config: Of the model.
        images: I.

    Returns:
        Keyword arguments.
    """
    if features is None:
        return image_inputs(config, images)
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features[:images])}}


def _backbone(model: nn.Module) -> Any:
    base: Any = base_of(model)
    return getattr(base, base.base_model_prefix)
