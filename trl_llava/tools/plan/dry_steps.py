"""What a step of SFT and of the reward model computes, on fake tensors.

Letters: `B` batch, `L` sequence, `V` vocabulary.
"""

from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from trl.trainer.utils import entropy_from_logits

from trl_llava.models.base_model import base_of
from trl_llava.models.shared_prefix import attention_mask_for
from trl_llava.tools.plan.dry_passes import autocast, image_inputs, text_inputs
from trl_llava.tools.plan.memory_trace import MemoryTrace

CHUNK = 256
"""Tokens whose logits TRL's `loss_type: chunked_nll` has in memory at once."""


def sft_step(model: nn.Module, batch: dict[str, Any], trace: MemoryTrace, *, bf16: bool, loss_type: str) -> None:
    """Forward and backward pass of SFT.

    `chunked_nll` has the logits of 256 tokens in memory, and the whole output layer in fp32; `nll` all B x L x V of
    them: as the layer makes them, in fp32, and their gradient.

    Args:
        model: The policy.
        batch: (B, L) ids and mask, and images.
        trace: Follows the bytes.
        bf16: Whether it trains in bf16.
        loss_type: TRL's.
    """
    base = base_of(model)
    labels = torch.ones_like(batch["input_ids"])
    if loss_type == "chunked_nll":
        with autocast(bf16):
            hidden = base.base_model(**batch, use_cache=False).last_hidden_state
            with trace.counting_as("logits"):
                loss = _chunked_loss(hidden, base.get_output_embeddings(), labels)
        del hidden
    else:
        run = convert_outputs_to_fp32(autocast(True)(model.forward)) if bf16 else model.forward
        output = run(**batch, labels=labels, use_cache=False)
        loss = output.loss
        with torch.no_grad(), trace.counting_as("logits"):
            entropy_from_logits(output.logits[..., :-1, :])
            output.logits[..., :-1, :].argmax(-1)
        del output  # but for what the backward pass needs
    loss.backward()


def _chunked_loss(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """TRL's `_chunked_cross_entropy_loss`, whose loop asks for the number of labelled tokens; here all are."""
    hidden = hidden[..., :-1, :].reshape(-1, hidden.shape[-1])
    hidden = hidden[(labels[..., 1:].reshape(-1) != -100).to(torch.int8).argsort(descending=True, stable=True)]
    flat = labels[..., 1:].reshape(-1)
    loss = entropy = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(flat), CHUNK):
        rows = slice(start, start + CHUNK)
        part, more = checkpoint(_chunk, hidden[rows], head.weight, flat[rows], use_reentrant=False)
        loss, entropy = loss + part, entropy + more
    return loss / len(flat)


def _chunk(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and entropy of some tokens; TRL computes the entropy with gradients on, so autograd keeps what it needs."""
    logits = hidden.float() @ weight.float().t()  # named, so that it lives as long as in TRL's
    logprobs = nn.functional.log_softmax(logits, dim=-1)
    loss = nn.functional.nll_loss(logprobs, labels, reduction="sum")
    logprobs.argmax(-1)
    return loss, -(logprobs.exp() * logprobs).sum()


def reward_step(
    model: nn.Module, config: PreTrainedConfig, pairs: int, images: int, length: int, *, shared: int, bf16: bool
) -> None:
    """Forward and backward pass of the reward model over pairs, each picture encoded once.

    What both answers share runs once too: a pair is one row of twice its length less what is shared, under a mask of
    that length squared. With nothing shared it is two rows.

    Args:
        model: The reward model.
        config: Its configuration.
        pairs: B.
        images: Pictures of each pair.
        length: L of the longer answer, with all that comes before it.
        shared: Tokens that both answers of a pair begin with, as far as they run once.
        bf16: Whether it trains in bf16.
    """
    base = base_of(model)
    seen = image_inputs(config, pairs * images)
    with autocast(bf16):
        if shared:
            batch = text_inputs(pairs, 2 * length - shared)
            segments = torch.ones_like(batch["input_ids"])
            mask = attention_mask_for(base, segments)
            hidden = base.model(
                input_ids=batch["input_ids"], attention_mask=mask, position_ids=segments, use_cache=False, **seen
            ).last_hidden_state
            ends = torch.zeros(2, pairs, dtype=torch.long)
            logits = base.score(hidden[torch.arange(pairs), ends].flatten(0, 1).to(base.score.weight.dtype))
            del hidden
        else:
            logits = model(**text_inputs(2 * pairs, length), **seen, image_copies=2, use_cache=False).logits
        chosen, rejected = logits.float().squeeze(-1).chunk(2)
    (-nn.functional.logsigmoid(chosen - rejected).mean()).backward()
