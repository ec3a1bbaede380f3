"""Attention over packed rows that computes no score which their mask would throw away.

Under a 4D mask torch computes all L x L scores of a pack, though half of them lie ahead of their query and many more
between two rests. Where each row is taken on its own, `[prefix | first rest]` is plain causal attention, and a further
rest is attention of its tokens over `[prefix | rest]`.

Letters: `P` packs, `L` length of the longest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


class PackMask(torch.Tensor):
    """A (P, 1, L, L) bool mask, `True` where a query may look, that says of which rows the packs consist.

    To everything but `scaled_dot_product_attention` it is a mask like any other.

    Attributes:
        lengths: for each pack the number of tokens in its prefix and in each of its rests.
    """

    lengths: list[list[int]]

    @classmethod
    def of(cls, seen: torch.Tensor, lengths: list[list[int]]) -> "PackMask":
        """Say of which rows a mask's packs consist.

        Args:
            seen: (P, 1, L, L) bool.
            lengths: for each pack the number of tokens in its prefix and in each of its rests.

        Returns:
            The mask; nothing is copied.
        """
        mask = seen.as_subclass(cls)
        mask.lengths = lengths
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take attention row by row; every other function sees, and returns, plain tensors."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention and isinstance(mask := kwargs.get("attn_mask"), cls):
                return row_by_row(*args, lengths=mask.lengths, **{**kwargs, "attn_mask": None})
            return func(*args, **kwargs)


def row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, lengths: list[list[int]], **kwargs: Any
) -> torch.Tensor:
    """Attention in which each rest sees its prefix and itself.

    Args:
        query: (P, heads, L, size).
        key: (P, heads, L, size).
        value: (P, heads, L, size).
        lengths: for each pack the number of tokens in its prefix and in each of its rests.
        **kwargs: further arguments of `scaled_dot_product_attention`, `attn_mask` and `is_causal` being our own.

    Returns:
        (P, heads, L, size), 0 at padding.
    """
    own = {name: given for name, given in kwargs.items() if name not in ("attn_mask", "is_causal")}
    packs = zip(query.split(1), key.split(1), value.split(1), lengths, strict=True)
    return torch.cat([_one_pack(*pack, own) for pack in packs])


def _one_pack(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], kwargs: dict[str, Any]
) -> torch.Tensor:
    """(1, heads, L, size) of one pack."""
    prefix, first, *others = lengths
    # Split, not sliced: the gradient of a slice is as wide as what it was cut from.
    queries = query.split([prefix + first, *others, query.shape[2] - sum(lengths)], dim=2)
    keys, values = (part.split([prefix, first, *others, part.shape[2] - sum(lengths)], dim=2) for part in (key, value))
    found = [_attend(queries[0], *(torch.cat(parts[:2], dim=2) for parts in (keys, values)), is_causal=True, **kwargs)]
    for place, part in enumerate(queries[1:-1], start=2):
        whole = (torch.cat((parts[0], parts[place]), dim=2) for parts in (keys, values))
        found.append(_attend(part, *whole, attn_mask=_causal(part, prefix), **kwargs))
    return pad(torch.cat(found, dim=2), (0, 0, 0, query.shape[2] - sum(lengths)))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, **kwargs)


def _causal(query: torch.Tensor, behind: int) -> torch.Tensor:
    """(T, `behind` + T): a query sees all that is behind, and of its own T those up to itself."""
    length = query.shape[2]
    return torch.ones(length, behind + length, dtype=torch.bool, device=query.device).tril(behind)
