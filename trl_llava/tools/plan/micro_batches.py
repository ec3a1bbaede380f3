"""The micro-batches of a pass over a rollout that may need most memory."""

import math
from typing import NamedTuple


class Shape(NamedTuple):
    """What a pass over a rollout computes at once.

    Attributes:
        prompts: Number of prompts.
        answers: Answers to each that run behind it as one row.
        length: Tokens of a prompt.
    """

    prompts: int
    answers: int
    length: int

    @property
    def rows(self) -> int:
        """Rows of the rollout.

        Returns:
            Their number.
        """
        return self.prompts * self.answers


def largest(most: int, answers: int, prompt: int, answer: int, budget: int | None) -> list[Shape]:
    """The micro-batches that may need most: of the longest rows, or of more and shorter ones.

    Args:
        most: Rows at most.
        answers: Answers to a prompt that run behind it as one row.
        prompt: Tokens of the longest prompt.
        answer: Tokens of the longest answer.
        budget: `max_tokens_per_micro_batch`.

    Returns:
        One, or two.
    """
    if budget is None:
        return [Shape(math.ceil(most / answers), answers, prompt)]
    while answers > 1 and prompt + answers * answer > budget:
        answers -= 1
    fit, prompts = budget // (prompt + answers * answer), math.ceil(most / answers)
    longest = Shape(min(max(fit, 1), prompts), answers, prompt)
    if fit == 0 or fit >= prompts:
        return [longest]
    return [longest, Shape(fit + 1, answers, max(1, budget // (fit + 1) - answers * answer))]
