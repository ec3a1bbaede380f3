"""Log-probabilities and entropies of chosen tokens, the language-model head run on a few hundred positions at a time.

A head's output is by far the widest tensor of a model: for 32 completions of 512 tokens out of 32 000, 2 GiB in
float32, and more than that for its gradient. Here it never exists for more than `chunk_size` positions: one number per
token is kept of a chunk, and its logits are computed again in the backward pass.

Letters: `n` positions, `H` hidden, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.integrations import is_deepspeed_zero3_enabled


class Sampling(NamedTuple):
    """How a model's logits become the distribution that tokens are drawn from."""

    temperature: float = 1.0
    suppressed: Sequence[int] = ()  # ids that generation never draws, such as the image token
    chunk_size: int = 512  # for how many positions the head runs at once

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 logits of the distribution that tokens are drawn from, out of the head's (..., V)."""
        logits = raw.float() / (self.temperature + 1e-7)
        blocked = [token for token in self.suppressed if token < logits.shape[-1]]
        if blocked:  # in place: a copy would be as large again as the widest tensor of the model
            # The smallest finite number rather than -inf: probability 0, and no 0 * inf in the entropy.
            places = torch.tensor(blocked, device=logits.device)
            logits.index_fill_(-1, places, torch.finfo(logits.dtype).min)
        return logits


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(...) log-probabilities in nats of tokens, (...) ids, under the softmax of logits (..., V)."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropies_of(logits: torch.Tensor) -> torch.Tensor:
    """(...) entropies in nats of the softmax of logits (..., V)."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """(..., V) logits of a model that keeps them below `cap`, out of its head's; None leaves them as they are."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def token_statistics(
    hidden: torch.Tensor,
    head: nn.Module,
    tokens: torch.Tensor,
    sampling: Sampling,
    *,
    entropies: bool,
    cap: float | None = None,
    context_fn: Callable[..., Any] = noop_context_fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (n,) of tokens; entropies of what they were drawn from, (n,) or (0,) if not wanted; float32.

    `hidden` (n, H) are the hidden states that the n tokens are predicted from; the head may be trained, or have an
    adapter; entropies carry no gradient. `cap` is what the model keeps its logits below. `context_fn` is that of
    `torch.utils.checkpoint`, for the head's two runs.
    """

    def chunk(states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = sampling.logits(capped(head(states), cap))
        logprobs = logprobs_of(logits, ids)
        # Behind the log-probabilities, so that the second run, in the backward pass, stops before it.
        return logprobs, entropies_of(logits.detach()) if entropies else logprobs.new_empty(0)

    count = _chunk_count(len(tokens), sampling.chunk_size, tokens.device)
    parts = []
    for states, ids in zip(hidden.tensor_split(count), tokens.tensor_split(count), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, states, ids, use_reentrant=False, context_fn=context_fn))
        else:
            parts.append(chunk(states, ids))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _chunk_count(tokens: int, chunk_size: int, device: torch.device) -> int:
    """How often the head runs: under ZeRO-3 every process must, for all fetch the head's weights together."""
    count = max(1, -(-tokens // chunk_size))
    if not is_deepspeed_zero3_enabled():
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
