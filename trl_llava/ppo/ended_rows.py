"""When generation goes on without the rows that have ended.

transformers' `generate` runs the model on all rows until the last of them has ended. With answers of mixed length much
of that work, and of what is read from the cache, is for nothing. So a call of it is stopped when a part of its rows
has ended, and the next one goes on with the others and what the cache holds of them.

Letters: `B` batch, `L` length so far, `V` vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.passes import position_kwargs

PART = 4
"""A call ends when one row of so many has ended; the next one costs a copy of what the cache holds of the others."""


class EnoughEnded(StoppingCriteria):
    """Stops a call of `generate` when one row of `PART` has ended, and one at least."""

    def __init__(self, start: int, stop_token_id: int) -> None:
        """Begin with rows of which none has ended.

        Args:
            start: columns of `input_ids` before the first token that this call generates.
            stop_token_id: ends an answer.
        """
        self.start = start
        self.stop_token_id = stop_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Count the ended rows.

        Args:
            input_ids: (B, L).
            scores: (B, V), not looked at.
            **kwargs: what other criteria need.

        Returns:
            (B,) bool, the same for all rows.
        """
        ended = (input_ids[:, self.start :] == self.stop_token_id).any(1).sum()
        return (ended * PART >= len(input_ids)).expand(len(input_ids))


def can_drop_rows(policy: nn.Module, inputs: ModelInputs) -> bool:
    """Whether generation may go on with some rows of a batch.

    Args:
        policy: the policy.
        inputs: prompts.

    Returns:
        `False` for a model that derives its own positions and keeps them by row, and where the processes of ZeRO-3
        have to call the model equally often.
    """
    if len(inputs) == 1 or is_deepspeed_zero3_enabled():
        return False
    return bool(position_kwargs(policy, inputs.attention_mask))
