"""Which rows of a rollout run together: alike in length, and no more tokens at once than a budget allows.

Whatever the split, the results are the same: losses are shares of a mean over the whole mini-batch, and what a pass
gives goes back to the place of its row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator


class Lengths(NamedTuple):
    """How long the rows of a rollout are, in tokens, without padding.

    Attributes:
        prompts: of each row, image tokens included; the longer one where policy and value model see different ones.
        responses: of each row.
        groups: rows with the same number run as one, their prompt shared; None if every row runs on its own.
    """

    prompts: Sequence[int]
    responses: Sequence[int]
    groups: Sequence[int] | None = None

    def padded(self, rows: Sequence[int]) -> int:
        """How many tokens a pass over these rows computes.

        Args:
            rows: indices of rows.

        Returns:
            Their number, padding included.
        """
        if self.groups is None:
            return len(rows) * max(self.prompts[row] + self.responses[row] for row in rows)
        packs = self._packs(rows)
        return len(packs) * max(packs.values())

    def longest_first(self, rows: Sequence[int]) -> list[int]:
        """Sort rows by length, those that run as one beside each other.

        Args:
            rows: indices of rows.

        Returns:
            The same indices; what is equally long keeps its order.
        """
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
    """Split rows into micro-batches of similar length, the longest first.

    Args:
        rows: indices of rows.
        lengths: how long they are.
        max_rows: most rows of a micro-batch.
        max_tokens: most tokens of a micro-batch, padding included; `None` for no limit. A row that is longer on its
            own is a micro-batch of its own.
        accelerator: knows the other processes. All get the same number of micro-batches, since under DeepSpeed every
            pass is a collective one; `None` where a pass is each process's own.

    Returns:
        The micro-batches; every row is in one of them.
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
