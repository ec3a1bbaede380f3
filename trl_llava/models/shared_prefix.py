"""Rows that begin alike, run as one: `[common prefix | rest of row 1 | rest of row 2 | ...]`.

Both candidates of a preference pair, and several answers to one prompt, share image and question, which are most of
their tokens. Position ids let every rest follow the prefix directly, and a 4D mask keeps the rests from seeing each
other, so that each token gets the hidden state it would have in a row of its own.

Letters: `P` packs, `L` length of the longest, `S` rests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from trl_llava.models.base_model import base_of
from trl_llava.models.row_by_row import PackMask

PREFIX, PADDING = 0, -1
"""Segments of a pack that are no rest; the rests count from 1."""


class Packed(NamedTuple):
    """Rows packed by common prefix, right-padded.

    Attributes:
        input_ids: (P, L) long; 0 at padding.
        attention_mask: (P, L) long, 1 at real tokens.
        position_ids: (P, L) long, each token's place in its own row.
        segments: (P, L) long: 0 in the prefix, 1 to S in the rests, -1 at padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor


def pack(
    prefixes: Sequence[torch.Tensor], rests: Sequence[Sequence[torch.Tensor]], multiple: int | None = None
) -> Packed:
    """Lay out rows that share a prefix.

    Args:
        prefixes: P tensors of ids, none empty.
        rests: for each of them the ids that follow it in each of its rows.
        multiple: round L up to a multiple of this.

    Returns:
        The packs.
    """
    lengths = [len(prefix) + sum(map(len, own)) for prefix, own in zip(prefixes, rests, strict=True)]
    width = max(lengths)
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
    """Pack two rows each by the longest prefix that they share; at least the last token of each stays its own.

    Args:
        first: P lists of ids.
        second: P lists of ids, each of which shares at least its first token with its neighbour.
        multiple: round L up to a multiple of this.

    Returns:
        The packs, with segment 1 from `first` and 2 from `second`.
    """
    return _pack_rows([list(pair) for pair in zip(first, second, strict=True)], multiple)


class Grouped(NamedTuple):
    """Rows packed by group.

    Attributes:
        packed: P packs, one for each group, in the order of their first rows.
        first: (P) the first row of each group.
        places: for each row the index of its result among the S * P of all first rests, all second ones, and so on.
    """

    packed: Packed
    first: list[int]
    places: list[int]


def pack_groups(rows: Sequence[list[int]], groups: Sequence[int]) -> Grouped:
    """Pack rows of the same group by the longest prefix that they share; a row on its own is a pack of one rest.

    Args:
        rows: lists of at least two ids.
        groups: for each of them its group.

    Returns:
        The packs, on the CPU.
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
    """Pack rows by the longest prefix that those of a pack share; the last token of each stays its own."""
    prefixes, rests = [], []
    for rows in packs:
        common = common_prefix(rows)
        prefixes.append(torch.tensor(rows[0][:common]))
        rests.append([torch.tensor(row[common:]) for row in rows])
    return pack(prefixes, rests, multiple)


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens rows share at their beginning; the last token of each stays its own.

    Args:
        rows: lists of at least one id.

    Returns:
        The number.
    """
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)


def predictors(packed: Packed, counts: Sequence[int]) -> list[torch.Tensor]:
    """From which hidden states the tokens of each rest are predicted: the one before each.

    Args:
        packed: P packs.
        counts: how many rests each of them has.

    Returns:
        For each rest, in order, the indices of its tokens' predictors into the P * L flattened hidden states.
    """
    width = packed.segments.shape[1]
    found = []
    for row, (prefix, *rests) in enumerate(_lengths(packed.segments, counts)):
        start = prefix
        for length in rests:
            before = [prefix - 1, *range(start, start + length - 1)][:length]
            found.append(torch.tensor(before, dtype=torch.long, device=packed.segments.device) + row * width)
            start += length
    return found


def _lengths(segments: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """The number of tokens in each pack's prefix, and in each of its rests, of which there are `counts`."""
    return [
        torch.bincount(own[own != PADDING], minlength=count + 1).tolist()
        for own, count in zip(segments.cpu(), counts, strict=True)
    ]


def last_of_rests(segments: torch.Tensor) -> torch.Tensor:
    """Where each rest ends.

    Args:
        segments: (P, L), each pack with S rests.

    Returns:
        (S, P) index of the last token of each rest.
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    rests = torch.arange(1, int(segments.max()) + 1, device=segments.device)
    return (place * (segments == rests[:, None, None])).argmax(-1)


def attention_mask_for(model: nn.Module, segments: torch.Tensor) -> torch.Tensor | BlockMask:
    """The mask that keeps the rests of a pack apart, as the model's attention takes it.

    Args:
        model: the model that will run.
        segments: (P, L).

    Returns:
        (P, 1, L, L): bool for sdpa, `True` where a query may look; for eager attention 0 there, and the smallest
        number of the model's dtype elsewhere; for flex attention a `BlockMask`.
    """
    if (attention := _attention(model)) == "flex_attention":
        return _block_mask(segments)
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    # Padding sees the prefix and itself: a query that sees nothing would give NaN.
    seen = causal & ((key == PREFIX) | (key == query))
    if attention == "sdpa":
        return PackMask.of(seen, _lengths(segments, segments.amax(1).tolist())) if _on_cpu(model, segments) else seen
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _block_mask(segments: torch.Tensor) -> BlockMask:
    """The same, by blocks: those in which no query may look are left out."""

    def seen(pack: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        other = segments[pack, key]
        return (query >= key) & ((other == PREFIX) | (other == segments[pack, query]))

    rows, width = segments.shape
    return create_block_mask(seen, rows, None, width, width, device=segments.device)


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot run packed rows.

    Args:
        model: any model of transformers, or a PEFT model around one.

    Returns:
        The reason, for the log, or `None` if it can.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    if (attention := _attention(base)) not in ("sdpa", "eager", "flex_attention"):
        return f"attention '{attention}' takes no 4D mask (use attn_implementation: sdpa)"
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    if set(getattr(config, "layer_types", None) or [window]) != {"full_attention"}:
        return f"{type(base).__name__} has layers without full attention"
    if derives_positions(base):
        return f"{type(base).__name__} derives its own positions"
    return None


def derives_positions(model: nn.Module) -> bool:
    """Whether a model makes multimodal positions of its own from the attention mask.

    Args:
        model: any model of transformers, or a PEFT model around one.

    Returns:
        `False` for a model that takes plain position ids.
    """
    base = base_of(model)
    return any(hasattr(part, "get_rope_index") for part in (base, getattr(base, base.base_model_prefix, base)))


def _on_cpu(model: nn.Module, segments: torch.Tensor) -> bool:
    """Whether packs are taken row by row, measured on CPUs only; compiled layers would be compiled for each batch."""
    compiled = any(part._compiled_call_impl is not None for part in model.modules())
    return type(segments) is torch.Tensor and segments.device.type == "cpu" and not compiled


def _attention(model: nn.Module) -> str:
    """Which attention the language model runs with."""
    base = base_of(model)
    return base.config.get_text_config()._attn_implementation
