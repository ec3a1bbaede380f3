"""What a GPU can do by its data sheet, and what a pass of the model asks of it: arithmetic, nothing is measured."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.workload import Size

BYTES = {"bf16": 2.0, "nf4": 4.127 / 8}
"""Bytes that a weight of the language model takes; NF4 with its doubly quantised scales."""


class Card(NamedTuple):
    """What a card can do, by its data sheet.

    Attributes:
        tflops: Dense bfloat16 matrix work, in 10^12 operations per second.
        gbs: Memory bandwidth, in 10^9 bytes per second.
    """

    tflops: float
    gbs: float


CARDS = {
    "B200": Card(2250, 8000),
    "GH200": Card(989, 4000),
    "H200 NVL": Card(835, 4800),
    "H200": Card(989, 4800),
    "H100 PCIe": Card(756, 2000),
    "H100 NVL": Card(835, 3938),
    "H100": Card(989, 3350),
    "A100-SXM4-80GB": Card(312, 2039),
    "A100-SXM4-40GB": Card(312, 1555),
    "A100-PCIE-40GB": Card(312, 1555),
    "A100": Card(312, 1935),
    "A40": Card(150, 696),
    "A30": Card(165, 933),
    "L40S": Card(362, 864),
    "L40": Card(181, 864),
    "L4": Card(121, 300),
    "A10G": Card(70, 600),
    "A10": Card(125, 600),
    "RTX A6000": Card(155, 768),
    "RTX 6000 Ada": Card(364, 960),
    "RTX 4090": Card(165, 1008),
    "RTX 3090 Ti": Card(80, 1008),
    "RTX 3090": Card(71, 936),
}
"""Words of the name that CUDA gives a card -> the card; the first that fits counts."""


def find_card(name: str, tflops: float | None, gbs: float | None) -> Card:
    """What the card can do.

    Args:
        name: As CUDA calls it.
        tflops: Instead of the data sheet's.
        gbs: Instead of the data sheet's.

    Returns:
        The card.

    Raises:
        SystemExit: If it is not known, or a part of one (MIG), and not both numbers are given.
    """
    words = () if re.search(r"\bMIG\b", name) else CARDS  # a slice has neither the work nor the bandwidth of its card
    known = next((CARDS[part] for part in words if re.search(rf"\b{re.escape(part)}\b", name)), None)
    if known is None and (tflops is None or gbs is None):
        raise SystemExit(
            f"error: the peak of the card {name!r} is not known here: give --peak-tflops (dense bfloat16) and "
            "--bandwidth-gbs from its data sheet"
        )
    known = known or Card(0, 0)
    return Card(tflops or known.tflops, gbs or known.gbs)


def layer_weights(size: Size) -> int:
    """Weights of the language model's linear layers, all layers together, without embedding and head.

    Args:
        size: The model.

    Returns:
        Their number.
    """
    return size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)


def pass_flops(size: Size, lengths: Iterable[int], predicted: int, pictures: int) -> float:
    """Matrix work of one forward pass: two operations per weight and token, and causal attention.

    Args:
        size: The model.
        lengths: Tokens of each row, image tokens included.
        predicted: For how many tokens the head runs.
        pictures: How many go through the tower.

    Returns:
        Floating-point operations.
    """
    lengths = list(lengths)
    layers = 2 * layer_weights(size) * sum(lengths)
    attention = 2 * size.layers * size.hidden * sum(length**2 for length in lengths)
    head = 2 * size.vocabulary * size.hidden * predicted
    patches = size.image_tokens + 1
    tower = 2 * 12 * size.tower_hidden**2 * patches + 4 * size.tower_hidden * patches**2
    return layers + attention + head + pictures * size.tower_layers * tower


def training_flops(size: Size, lengths: Iterable[int], predicted: int, pictures: int) -> float:
    """Matrix work of a training pass with a frozen base.

    The backward pass goes through the language model once, for the gradients of its activations; the tower has none,
    the adapters' own share is left out, and what gradient checkpointing repeats is no work of the model's.

    Args:
        size: The model.
        lengths: As for `pass_flops`.
        predicted: As for `pass_flops`.
        pictures: As for `pass_flops`.

    Returns:
        Floating-point operations.
    """
    lengths = list(lengths)
    once = pass_flops(size, lengths, predicted, 0)
    return 2 * once + pass_flops(size, [], 0, pictures)


def decoding_bytes(size: Size, base: str, prompts: Sequence[int], answers: Sequence[int]) -> float:
    """Bytes that generation must read: all weights of the language model for each token, and the cache so far.

    Args:
        size: The model.
        base: "bf16" or "nf4".
        prompts: Tokens of each prompt.
        answers: Tokens of each answer.

    Returns:
        Bytes.
    """
    weights = layer_weights(size) * BYTES[base] + size.vocabulary * size.hidden * 2
    cache = sum(2 * size.layers * size.hidden * 2 * (p * a + a * a / 2) for p, a in zip(prompts, answers, strict=True))
    return max(answers) * weights + cache
