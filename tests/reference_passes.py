"""The plain way to log-probabilities, all logits at once: what chunked head and shared prefixes are compared with."""

from collections.abc import Sequence

import torch
from torch import nn

from trl_llava.chunked_head import Sampling, entropies_of, logprobs_of
from trl_llava.passes import position_kwargs
from trl_llava.rollout import ModelInputs


def response_logits(
    policy: nn.Module,
    inputs: ModelInputs,
    responses: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    suppressed: Sequence[int] = (),
) -> torch.Tensor:
    """(B, R, V) float32 logits of the distribution each of the (B, R) response tokens was drawn from."""
    kwargs = inputs.followed_by(responses, mask)
    kwargs.update(position_kwargs(policy, kwargs["attention_mask"]))
    output = policy(**kwargs, logits_to_keep=responses.shape[1] + 1, use_cache=False)
    return Sampling(temperature, suppressed).logits(output.logits[:, -responses.shape[1] - 1 : -1])


def token_logprobs(logits: torch.Tensor, responses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, R) log-probabilities of the response tokens, 0 at padding."""
    return torch.where(mask, logprobs_of(logits, responses.masked_fill(~mask, 0)), 0.0)


def token_entropies(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, R) entropies in nats, 0 at padding."""
    return torch.where(mask, entropies_of(logits), 0.0)
