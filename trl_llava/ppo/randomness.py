"""Random choices of a PPO run, each a pure function of the seed and of what is chosen, never of what ran before.

So the same row gets the same noise in any micro-batch, on any process and after any restart, and a resumed run needs
no generator states. Letters: `B` batch, `V` vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import LogitsProcessor

from trl_llava.errors import InputError


def _mix(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (https://doi.org/10.1145/2714064.2660195): int64 in, well-mixed int64 out, in place.

    In place, as all that follows: a step of generation draws for the whole vocabulary, and fresh memory for every
    operation would take longer than the operations.
    """

    def fold(x: torch.Tensor, bits: int) -> torch.Tensor:
        """`x ^= x >> bits`, a logical shift: torch's is arithmetic."""
        return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))

    fold(values, 30).mul_(-4658895280553007687)  # 0xBF58476D1CE4E5B9
    fold(values, 27).mul_(-7723592293110705685)  # 0x94D049BB133111EB
    return fold(values, 31)


def row_keys(seed: int, step: int, rows: torch.Tensor) -> torch.Tensor:
    """One key (B,) int64 for each row of a rollout.

    `rows` (B,) are places in the batch of all processes, so that two completions of one prompt differ.
    """
    key = torch.tensor([seed], dtype=torch.int64, device=rows.device)
    for part in (torch.tensor([step], dtype=torch.int64, device=rows.device), rows.to(torch.int64)):
        key = _mix(key * 6364136223846793005 + part + 1442695040888963407)
    return key


def uniform(keys: torch.Tensor, position: torch.Tensor | int, size: int) -> torch.Tensor:
    """(B, V) float64 uniform numbers in (0, 1), the same on every device: draw number `position` of each (B,) key."""
    place = torch.as_tensor(position, device=keys.device) * 7046029254386353131
    index = torch.arange(size, dtype=torch.int64, device=keys.device) * -7046029254386353131
    state = _mix(_mix(keys + place).unsqueeze(1) + index)
    bits = (state >> 12).bitwise_and_((1 << 52) - 1)  # 52 bits and a half, so that neither 0 nor 1 comes out
    return bits.double().add_(0.5).div_(1 << 52)


def gumbel_scores(
    scores: torch.Tensor, keys: torch.Tensor, position: torch.Tensor, temperature: float
) -> torch.Tensor:
    """(B, V) logits / temperature + Gumbel noise, whose argmax is a draw from the softmax of logits / temperature.

    The noise is a function of each row's key (B,) and of `position`, an int64 tensor of one number.
    """
    draws = uniform(keys, position, scores.shape[1])
    return (scores / temperature).sub_(draws.log_().neg_().log_().to(scores.dtype))


class RowNoise(LogitsProcessor):
    """Adds Gumbel noise to the logits, so that their argmax is a draw from their softmax.

    `generate(do_sample=False)` with this processor samples as `do_sample=True` does, only with noise that belongs to
    a row and a position instead of to the state of a global generator.
    """

    def __init__(self, keys: torch.Tensor, prompt_length: int, temperature: float) -> None:
        self.keys = keys
        self.prompt_length = prompt_length
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) logits / temperature + noise, from (B, length so far) ids and (B, V) logits."""
        position = torch.tensor(input_ids.shape[1] - self.prompt_length, device=scores.device)
        return gumbel_scores(scores, self.keys, position, self.temperature)


class RolloutBatches(Sampler[list[int]]):
    """Which rows each step completes: every epoch a new order, of which each process has its part.

    Rows beyond the last whole batch of an epoch wait for the next one, as with TRL's `drop_last`.
    """

    def __init__(self, rows: int, batch_size: int, process: tuple[int, int], seed: int, steps: range) -> None:
        """Describe the batches.

        Args:
            rows: number of rows in the data set.
            batch_size: rows of a step on all processes together, whatever the number of completions of each.
            process: index of this process, and how many there are.
            seed: the run's seed.
            steps: which steps, counted from 0.

        Raises:
            ValueError: if there are fewer rows than a batch holds.
        """
        if rows < batch_size:
            raise InputError(
                f"train_dataset has {rows} usable rows, fewer than the {batch_size} of one batch: lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self.rows, self.batch_size, self.process, self.seed, self.steps = rows, batch_size, process, seed, steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of this process, step after step."""
        index, processes = self.process
        share = self.batch_size // processes
        per_epoch = self.rows // self.batch_size
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            start = place * self.batch_size + index * share
            yield order[start : start + share].tolist()

    def __len__(self) -> int:
        return len(self.steps)


def mini_batch_order(rows: int, mini_batches: int, seed: int, process: int, step: int, epoch: int) -> np.ndarray:
    """(rows,) the order in which one pass of an update runs over a rollout: the first mini-batch, then the second, ...

    Of every `mini_batches` neighbouring rows each mini-batch gets one, drawn for these rows alone. So a mini-batch of
    all processes holds the same rows whatever the number of processes is; only their order within it differs.
    """
    order = np.random.default_rng([seed, process, step, epoch]).permutation(rows)
    if mini_batches == 1:
        return order
    groups = rows // mini_batches
    first = process * groups
    taken_by = np.concatenate(
        [
            np.random.default_rng([seed, step, epoch, first + group]).permutation(mini_batches)
            for group in range(groups)
        ]
    )
    return order[np.argsort(taken_by[order], kind="stable")]
