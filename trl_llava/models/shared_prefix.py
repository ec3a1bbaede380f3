"""Rows that begin alike, run as one: `[common prefix | rest of row 1 | rest of row 2 | ...]`.

Chosen and rejected completion of a pair, and several completions of one prompt, share image and prompt, which are
most of their tokens. Position ids let every rest follow the prefix directly, and a 4D mask keeps the rests from
attending to each other, so that each token gets the hidden state that it would have in a row of its own.

Letters: `P` packs, `L` length of the longest, `S` rests.
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.positions import derives_positions

PREFIX, PADDING = 0, -1
"""Segments of a pack that are no rest; the rests count from 1."""


class Packed(NamedTuple):
    """Rows packed by common prefix, right-padded."""

    input_ids: torch.Tensor  # (P, L) long, 0 at padding
    attention_mask: torch.Tensor  # (P, L) long, 1 at real tokens
    position_ids: torch.Tensor  # (P, L) long, each token's place in its own row
    segments: torch.Tensor  # (P, L) long: 0 in the prefix, 1 to S in the rests, -1 at padding


def pack(
    prefixes: Sequence[torch.Tensor], rests: Sequence[Sequence[torch.Tensor]], multiple: int | None = None
) -> Packed:
    """Lay out P prefixes, none empty, each with the rests of its rows; L is rounded up to a multiple of `multiple`."""
    width = max(len(prefix) + sum(map(len, own)) for prefix, own in zip(prefixes, rests, strict=True))
    width = width if multiple is None else -(-width // multiple) * multiple
    like = prefixes[0]
    input_ids, attention_mask, position_ids = (like.new_zeros(len(prefixes), width) for _ in range(3))
    segments = like.new_full((len(prefixes), width), PADDING)
    for row, (prefix, own) in enumerate(zip(prefixes, rests, strict=True)):
        start = 0
        for segment, ids in enumerate((prefix, *own)):
            place = slice(start, start + len(ids))
            input_ids[row, place], segments[row, place] = ids, segment
            first = 0 if segment == PREFIX else len(prefix)
            position_ids[row, place] = torch.arange(first, first + len(ids), device=like.device)
            start += len(ids)
        attention_mask[row, :start] = 1
    return Packed(input_ids, attention_mask, position_ids, segments)


def pack_pairs(first: Sequence[list[int]], second: Sequence[list[int]], multiple: int | None = None) -> Packed:
    """Pack P pairs of rows by the longest prefix that the two share: segment 1 from `first`, 2 from `second`."""
    return _pack_rows([list(pair) for pair in zip(first, second, strict=True)], multiple)


class Grouped(NamedTuple):
    """Rows packed by group: one pack for each group, in the order of their first rows."""

    packed: Packed
    first: list[int]  # (P) the first row of each group
    places: list[int]  # of each row's result among the S * P of all first rests, all second ones, and so on


def pack_groups(rows: Sequence[list[int]], groups: Sequence[int]) -> Grouped:
    """Pack rows of the same group by the longest prefix that they share, on the CPU; each has at least two ids.

    A row on its own is a pack of one rest.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    packed = _pack_rows([[rows[row] for row in own] for own in members.values()])
    places = {
        row: rest * len(members) + pack for pack, own in enumerate(members.values()) for rest, row in enumerate(own)
    }
    return Grouped(packed, [own[0] for own in members.values()], [places[row] for row in range(len(rows))])


def _pack_rows(packs: Sequence[Sequence[list[int]]], multiple: int | None = None) -> Packed:
    prefixes, rests = [], []
    for rows in packs:
        common = common_prefix(rows)
        prefixes.append(torch.tensor(rows[0][:common]))
        rests.append([torch.tensor(row[common:]) for row in rows])
    return pack(prefixes, rests, multiple)


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens rows share at their beginning; the last token of each stays its own."""
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)


def predictors(packed: Packed, counts: Sequence[int]) -> list[torch.Tensor]:
    """Indices into the P * L flattened hidden states that the tokens of each rest are predicted from, rest by rest.

    `counts` says how many rests each pack has; the first token of a rest is predicted from the end of the prefix.
    """
    width = packed.segments.shape[1]
    found = []
    for row, (segments, count) in enumerate(zip(packed.segments.cpu(), counts, strict=True)):
        prefix, *lengths = torch.bincount(segments[segments != PADDING], minlength=count + 1).tolist()
        start = prefix
        for length in lengths:
            before = [prefix - 1, *range(start, start + length - 1)][:length]
            found.append(torch.tensor(before, dtype=torch.long, device=packed.segments.device) + row * width)
            start += length
    return found


def last_of_rests(segments: torch.Tensor) -> torch.Tensor:
    """(S, P) the index of the last token of each rest, from (P, L) segments of packs with S rests each."""
    place = torch.arange(segments.shape[1], device=segments.device)
    rests = torch.arange(1, int(segments.max()) + 1, device=segments.device)
    return (place * (segments == rests[:, None, None])).argmax(-1)


def attention_mask_for(model: nn.Module, segments: torch.Tensor) -> torch.Tensor | BlockMask:
    """The mask that keeps the rests of a pack apart, in the form that the model's attention takes.

    (P, 1, L, L): bool for sdpa, `True` where a query attends; for eager attention 0 there, and the smallest number of
    the model's dtype elsewhere; for flex attention a `BlockMask`.
    """
    if (attention := _attention(model)) == "flex_attention":
        return _block_mask(segments)
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    # Padding attends to the prefix and itself: a query that attends to nothing would give NaN.
    attends = causal & ((key == PREFIX) | (key == query))
    if attention == "sdpa":
        return attends
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(attends.shape, dtype=dtype, device=attends.device).masked_fill(~attends, torch.finfo(dtype).min)


def _block_mask(segments: torch.Tensor) -> BlockMask:
    """The same by blocks, without those in which no query attends to any key."""

    def attends(pack: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        other = segments[pack, key]
        return (query >= key) & ((other == PREFIX) | (other == segments[pack, query]))

    rows, width = segments.shape
    return create_block_mask(attends, rows, None, width, width, device=segments.device)


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot run packed rows, for the log; `None` if it can."""
    base = base_of(model)
    config = base.config.get_text_config()
    if (attention := _attention(base)) not in ("sdpa", "eager", "flex_attention"):
        return f"attention '{attention}' takes no 4D mask (use attn_implementation: sdpa)"
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    if set(getattr(config, "layer_types", None) or [window]) != {"full_attention"}:
        return f"{type(base).__name__} has layers without full attention"
    if derives_positions(base):
        return f"{type(base).__name__} derives its own positions"
    if "token_type_ids" in inspect.signature(backbone_of(base).forward).parameters:
        return f"{type(base).__name__} does not attend causally everywhere"
    return None


def _attention(model: nn.Module) -> str:
    return base_of(model).config.get_text_config()._attn_implementation
