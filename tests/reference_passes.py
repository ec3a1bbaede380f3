"""The plain way to log-probabilities and values, with padding on both sides, a mask, and all logits at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trl_llava.models.chunked_head import Sampling, entropies_of, logprobs_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.positions import position_kwargs
from trl_llava.ppo.passes import completion_kind


def followed_by(model: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a pass over (B, Q + R): padding on the left of the prompt and on the right, and a mask."""
    attention_mask = torch.cat((inputs.attention_mask, mask.long()), 1)
    kwargs = {
        "input_ids": torch.cat((inputs.input_ids, responses), 1).masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
    }
    for name, value in inputs.tokens.items():
        kwargs[name] = torch.cat((value, torch.full_like(responses, completion_kind(model))), 1)
    return {**inputs.image_kwargs(), **kwargs}


def response_logits(
    policy: nn.Module,
    inputs: ModelInputs,
    responses: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    suppressed: Sequence[int] = (),
) -> torch.Tensor:
    """(B, R, V) float32 logits of the distribution each of the (B, R) response tokens was drawn from."""
    kwargs = followed_by(policy, inputs, responses, mask)
    kwargs.update(position_kwargs(policy, kwargs["attention_mask"]))
    output = policy(**kwargs, logits_to_keep=responses.shape[1] + 1, use_cache=False)
    return Sampling(temperature, suppressed).logits(output.logits[:, -responses.shape[1] - 1 : -1])


def plain_values(
    value_model: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(B, R) values, 0 at padding."""
    kwargs = followed_by(value_model, inputs, responses, mask)
    kwargs.update(position_kwargs(value_model, kwargs["attention_mask"]))
    hidden = value_model.model(**kwargs, use_cache=False).last_hidden_state
    return torch.where(mask, value_model.score(hidden[:, -responses.shape[1] - 1 : -1]).squeeze(-1), 0.0)


def token_logprobs(logits: torch.Tensor, responses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, R) log-probabilities of the response tokens, 0 at padding."""
    return torch.where(mask, logprobs_of(logits, responses.masked_fill(~mask, 0)), 0.0)


def token_entropies(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, R) entropies in nats, 0 at padding."""
    return torch.where(mask, entropies_of(logits), 0.0)
