"""The rollout: prompts, their completions, and what every role computes of each token.

Letters: `B` batch, `Q` query length (image tokens included), `R` response length, `I` images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from trl_llava.models.micro_batches import Lengths
from trl_llava.models.model_inputs import ModelInputs


@dataclass
class Rollout:
    """One batch of completions with all that is computed for them; a row's entries share one index everywhere.

    What the loop has not yet computed is empty.

    Attributes:
        inputs: the prompts as the policy sees them.
        value_inputs: the prompts as the value model sees them (its image tokens may differ in number).
        columns: the rows' columns (prompts, images, captions, ...), each a list of B.
        responses: (B, R) token ids, padded right.
        mask: (B, R) bool, `True` at real tokens: up to and including the first stop token.
        stopped: (B,) bool, `True` if the response holds its stop token.
        logprobs: (B, R) log-probabilities of the sampled tokens under the policy; 0 at padding, as all that follow.
        ref_logprobs: (B, R) the same under the reference.
        values: (B, R) the value before each token.
        empty: (B,) bool, `True` if the response has no text.
        scores: (B,) the sum of all reward terms of a response.
        terms: (B,) of each reward term on its own, by name.
        kl: (B, R) in nats.
        advantages: (B, R) whitened.
        returns: (B, R) what the value is trained on.
        importance: (B, R) weights of the policy's losses, with `vllm_importance_sampling_correction`.
    """

    inputs: ModelInputs
    value_inputs: ModelInputs
    columns: dict[str, list]
    responses: torch.Tensor
    mask: torch.Tensor
    stopped: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    empty: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scores: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    kl: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    returns: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    importance: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.responses)

    def lengths(self, share_prefix: bool) -> Lengths:
        """Lengths of the rows for micro-batches."""
        return lengths_of(self.inputs, self.value_inputs, self.mask, share_prefix)

    def select(self, rows: Sequence[int]) -> "Rollout":
        """These rows, in this order, as a micro-batch cut to its longest response."""
        rows = list(rows)
        width = int(self.mask[rows].sum(1).max())
        picked: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, ModelInputs):
                picked[item.name] = value.select(rows)
            elif isinstance(value, torch.Tensor) and value.numel() == 0:
                picked[item.name] = value
            elif isinstance(value, torch.Tensor):
                picked[item.name] = value[rows][:, :width] if value.dim() == 2 else value[rows]
            elif isinstance(value, dict):
                picked[item.name] = {
                    key: entry[rows] if isinstance(entry, torch.Tensor) else [entry[row] for row in rows]
                    for key, entry in value.items()
                }
            else:
                picked[item.name] = value
        return Rollout(**picked)


def lengths_of(inputs: ModelInputs, value_inputs: ModelInputs, mask: torch.Tensor, share_prefix: bool) -> Lengths:
    """Lengths of B rows for micro-batches; `mask` is (B, R) bool, `True` at real tokens of the responses."""
    prompts = inputs.lengths
    if value_inputs is not inputs:
        prompts = [max(pair) for pair in zip(prompts, value_inputs.lengths, strict=True)]
    groups = inputs.groups if share_prefix and inputs.can_be_packed and value_inputs.can_be_packed else None
    return Lengths(prompts, mask.sum(1).tolist(), groups)


def chunks(total: int, size: int) -> Iterator[list[int]]:
    """The indices 0..total-1 in consecutive lists of at most `size`."""
    for start in range(0, total, size):
        yield list(range(start, min(start + size, total)))


def pad_right(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
    """Stack chunks of rows (b, r) whose widths differ, filled up with `value`."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])
