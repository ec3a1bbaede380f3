"""Keys and values of generation, in memory that has room for the tokens to come.

transformers' dynamic cache makes a new tensor of all keys and values for each token and layer, and copies the old one
into it: for 8 rows of 700 tokens that costs as much time as the model's matrix work on a CPU. Here a layer writes the
new token behind the others, and copies only when its room is full.
"""

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""For how many tokens to come there is room after a layer has moved, at most."""


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, each the front part of a larger tensor."""

    def __init__(self, most_tokens: int) -> None:
        """Begin with nothing; the first tokens decide shape, dtype and device.

        Args:
            most_tokens: there is no room for more, until they come.
        """
        super().__init__()
        self.most_tokens = most_tokens
        self.whole: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new tokens behind the others.

        Args:
            key_states: (B, heads, new tokens, width).
            value_states: (B, heads, new tokens, width).
            *args: for other kinds of layers.
            **kwargs: for other kinds of layers.

        Returns:
            Keys and values of all tokens so far, (B, heads, tokens, width) each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._followed_by("keys", key_states), self._followed_by("values", value_states)
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, and the room for tokens to come.

        Args:
            indices: of the rows, in their new order; one may come more than once.
        """
        for name, (whole, front) in list(self.whole.items()):
            if getattr(self, name) is front:
                whole = whole[indices]
                self.whole[name] = whole, whole[..., : front.shape[-2], :]
                setattr(self, name, self.whole[name][1])
            else:
                del self.whole[name]
                setattr(self, name, getattr(self, name)[indices])

    def _followed_by(self, name: str, new: torch.Tensor) -> torch.Tensor:
        known: torch.Tensor = getattr(self, name)
        start = known.shape[-2] if known.numel() else 0
        end = start + new.shape[-2]
        whole, front = self.whole.get(name, (known, known))
        # Rows may have been picked since, or tokens dropped: then `known` is no longer what was handed out.
        if front is not known or whole.dim() != new.dim() or whole.shape[-2] < end:
            length = max(end, min(end + ROOM, self.most_tokens))
            whole = new.new_empty(*new.shape[:-2], length, new.shape[-1])
            if start:
                whole[..., :start, :] = known
        whole[..., start:end, :] = new
        front = whole[..., :end, :]
        self.whole[name] = (whole, front)
        return front


def growing_cache(policy: nn.Module, most_tokens: int) -> DynamicCache:
    """An empty cache for a model; layers with a sliding window stay transformers' own.

    Args:
        policy: the model, or a PEFT model around one.
        most_tokens: how long prompt and answer may become together.

    Returns:
        The cache.
    """
    cache = DynamicCache(config=policy.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer(most_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
