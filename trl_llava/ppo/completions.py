"""Completions of prompts: what a policy that generates, or vLLM in its place, hands to the PPO loop.

Letters: `B` batch, `R` response length.
"""

from typing import NamedTuple

import torch

from trl_llava.ppo.ppo_math import response_mask


class Completions(NamedTuple):
    """One completion of each of B prompts.

    Attributes:
        responses: (B, R) token ids, padded right; R is the length of the longest.
        mask: (B, R) bool, `True` at real tokens: up to and including the first stop token.
        stopped: (B,) bool, `True` if the response holds its stop token.
        logprobs: (B, R) float32 log-probabilities of the tokens under the policy that drew them, 0 at padding; `None`
            where a pass of its own computes them.
    """

    responses: torch.Tensor
    mask: torch.Tensor
    stopped: torch.Tensor
    logprobs: torch.Tensor | None = None

    @classmethod
    def from_tokens(
        cls, responses: torch.Tensor, stop_token_id: int | None, logprobs: torch.Tensor | None = None
    ) -> "Completions":
        """From (B, R) token ids whose padding, whatever it is, begins behind the first stop token."""
        mask = response_mask(responses, stop_token_id)
        width = int(mask.sum(1).max())
        responses, mask = responses[:, :width], mask[:, :width]
        logprobs = None if logprobs is None else logprobs[:, :width]
        stopped = torch.zeros(len(responses), dtype=torch.bool, device=responses.device)
        if stop_token_id is not None:
            stopped = ((responses == stop_token_id) & mask).any(1)
        return cls(responses, mask, stopped, None if logprobs is None else logprobs.float().masked_fill(~mask, 0.0))
