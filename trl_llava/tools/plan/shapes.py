"""The micro-batches of a rollout that may need most memory."""

import math
from typing import NamedTuple


class Shape(NamedTuple):
    """A micro-batch of a rollout: prompts of `length` tokens, each with completions that run behind it as one row."""

    prompts: int
    completions: int
    length: int

    @property
    def rows(self) -> int:
        """Rows of the rollout."""
        return self.prompts * self.completions


def largest(most: int, completions: int, prompt: int, response: int, budget: int | None) -> list[Shape]:
    """The one or two micro-batches that may need most: of the longest rows, or of more and shorter ones.

    `most` rows at most; tokens of the longest `prompt` and `response`; `budget` is `max_tokens_per_micro_batch`.
    """
    if budget is None:
        return [Shape(math.ceil(most / completions), completions, prompt)]
    while completions > 1 and prompt + completions * response > budget:
        completions -= 1
    fit, prompts = budget // (prompt + completions * response), math.ceil(most / completions)
    longest = Shape(min(max(fit, 1), prompts), completions, prompt)
    if fit == 0 or fit >= prompts:
        return [longest]
    return [longest, Shape(fit + 1, completions, max(1, budget // (fit + 1) - completions * response))]
