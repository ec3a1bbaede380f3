"""Which rows of a rollout run together: of similar length, and no more tokens at once than a budget allows.

Whatever the split, the results are the same but for rounding, which in 16 bit is seen: losses are shares of a mean
over the whole mini-batch, and the output of a pass goes back to the place of its row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator


class Lengths(NamedTuple):
    """How long the rows of a rollout are, in tokens, without padding."""

    prompts: Sequence[int]  # image tokens included; the longer one where policy and value model have different ones
    responses: Sequence[int]
    groups: Sequence[int] | None = None  # rows of one number run as one, their prompt shared; None: each on its own

    def padded(self, rows: Sequence[int]) -> int:
        """How many tokens, padding included, a pass over these rows computes."""
        if self.groups is None:
            return len(rows) * max(self.prompts[row] + self.responses[row] for row in rows)
        packs = self._packs(rows)
        return len(packs) * max(packs.values())

    def longest_first(self, rows: Sequence[int]) -> list[int]:
        """Sort rows by length, those that run as one beside each other; rows of equal length keep their order."""
        if self.groups is None:
            return sorted(rows, key=lambda row: -(self.prompts[row] + self.responses[row]))
        groups, packs = self.groups, self._packs(rows)
        return sorted(rows, key=lambda row: (-packs[groups[row]], groups[row], -self.responses[row]))

    def _packs(self, rows: Sequence[int]) -> dict[int, int]:
        """The length of each pack that these rows form."""
        assert self.groups is not None
        packs: dict[int, int] = {}
        for row in rows:
            group = self.groups[row]
            packs[group] = packs.get(group, self.prompts[row]) + self.responses[row]
        return packs


def micro_batches(
    rows: Sequence[int], lengths: Lengths, max_rows: int, max_tokens: int | None, accelerator: Accelerator | None
) -> list[list[int]]:
    """Split rows into micro-batches of similar length, the longest first, each row in one of them.

    A micro-batch has at most `max_rows` rows and `max_tokens` tokens, padding included; a row that is longer than that
    is alone. With an `accelerator` all processes get the same number of micro-batches, since under DeepSpeed every
    pass is a collective one; `None` where a pass is each process's own.
    """
    parts: list[list[int]] = []
    for row in lengths.longest_first(rows):
        fits = parts and len(parts[-1]) < max_rows
        if fits and (max_tokens is None or lengths.padded([*parts[-1], row]) <= max_tokens):
            parts[-1].append(row)
        else:
            parts.append([row])
    if max_tokens is not None and accelerator is not None and accelerator.num_processes > 1:
        count = torch.tensor([len(parts)], device=accelerator.device)
        _split_into(parts, int(accelerator.gather(count).max()))
    return parts


def _split_into(parts: list[list[int]], count: int) -> None:
    """Halve the micro-batches with most rows until there are `count` of them."""
    while len(parts) < count:
        place = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[place]) // 2
        parts[place : place + 1] = [parts[place][:half], parts[place][half:]]
