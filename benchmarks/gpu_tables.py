"""The tables of the GPU sweep: speeds and shares of each case, and the largest batch that fits cards of some sizes."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import ppo_sides, sft_step
from benchmarks.gpu_work import Card, decoding_bytes, pass_flops, training_flops
from benchmarks.tables import markdown
from benchmarks.workload import Size

CAPACITIES_GB = (24, 48, 80, 140)
USABLE = 0.95
"""The share of a card that PyTorch may fill: the rest is CUDA's own, and what fragments."""


class Case(NamedTuple):
    """One point of the sweep.

    Attributes:
        stage: "sft", "reward" or "ppo".
        base: "bf16" or "nf4".
        batch: Rows (pairs of the reward model) that a pass takes at once, and a step trains on.
    """

    stage: str
    base: str
    batch: int


def ppo_of(case: Case, size: Size, steps: int, response_length: int) -> ppo_sides.Step:
    """The PPO step of a case: answers of four lengths, evenly spread up to the limit.

    Args:
        case: Which.
        size: The model.
        steps: How many steps are run.
        response_length: The limit.

    Returns:
        The step.
    """
    lengths = tuple(response_length * (4 - row % 4) // 4 for row in range(case.batch))
    return ppo_sides.Step(size, lengths, response_length, micro_batch=case.batch, epochs=1, steps=steps)


def speeds(case: Case, size: Size, runs: list[dict[str, Any]], card: Card, response_length: int) -> dict[str, Any]:
    """A row of the table.

    Args:
        case: The case.
        size: The model.
        runs: Its runs.
        card: What the card can do.
        response_length: Of PPO.

    Returns:
        Column -> cell. Lengths are those of the workload's middle: prompts have about 40 tokens of template, the
        judging turn with captions about 200. What is computed once is counted once: a pair's prompt, for both answers.
        The share of bandwidth is too low by the time of the prompts' own pass, and where memory makes generation take
        a batch in parts, each of which reads the weights.
    """
    if runs[0]["seconds"] is None:
        nothing = dict.fromkeys(("tokens/s", "peak GB", "of bf16 peak", "of bandwidth, generation"))
        return {**case._asdict(), "s per step": runs[0]["run"], **nothing}
    seconds = statistics.median(run["seconds"] for run in runs)
    prompt = size.image_tokens + size.question + 40
    bandwidth = None
    if case.stage == "ppo":
        answers = ppo_of(case, size, 1, response_length).lengths
        rows = [prompt + answer for answer in answers]
        # Prompts once and tokens one by one in generation; policy, reference, value and reward; two trained.
        generated = pass_flops(size, rows, sum(answers), 0)
        asked = 2 * pass_flops(size, rows, sum(answers), 0) + 2 * pass_flops(size, rows, 0, 0)
        trained = training_flops(size, rows, sum(answers), 0) + training_flops(size, rows, 0, 0)
        flops = generated + asked + trained + pass_flops(size, [], 0, case.batch)
        generation = statistics.median(run["phases"]["generation"] for run in runs)
        moved = decoding_bytes(size, case.base, [prompt] * case.batch, answers)
        bandwidth = moved / generation / (card.gbs * 1e9)
        tokens = sum(rows)
    else:
        answer = sum(sft_step.Step.answer) / 2
        behind = 2 * (answer + 200) if case.stage == "reward" else answer
        rows = [round(prompt + behind)] * case.batch
        predicted = 0 if case.stage == "reward" else sum(rows)
        flops = training_flops(size, rows, predicted, case.batch)
        tokens = sum(rows)
    return {
        **case._asdict(),
        "s per step": seconds,
        "tokens/s": tokens / seconds,
        "peak GB": peak_gb(runs),
        "of bf16 peak": flops / seconds / (card.tflops * 1e12),
        "of bandwidth, generation": bandwidth,
    }


def peak_gb(runs: list[dict[str, Any]]) -> float:
    """Peak memory of a case.

    Args:
        runs: Its runs.

    Returns:
        10^9 bytes, of the GPU if there is one.
    """
    return max(run.get("gpu_mib", run["peak_mib"]) for run in runs) * 2**20 / 1e9


def largest_batches(
    entries: list[dict[str, Any]], total_gb: float, fits: Callable[[Case, float], bool]
) -> list[dict[str, Any]]:
    """The largest batch of the sweep that fits cards of some sizes.

    Args:
        entries: What `sweep` finds, of all cases.
        total_gb: Memory of this card: what would fit a larger one is not known.
        fits: Tries whether a case runs within so many 10^9 bytes; asked where it took more when it had the whole card.

    Returns:
        A row for each stage and base: `24 GB` and so on -> batch, 0 if none fits, None if not known,
            as where all cases failed.
    """
    rows = []
    for stage, base in dict.fromkeys((entry["stage"], entry["base"]) for entry in entries):
        row: dict[str, Any] = {"stage": stage, "base": base}
        all_own = [entry for entry in entries if (entry["stage"], entry["base"]) == (stage, base)]
        own = [entry for entry in all_own if entry["seconds"]]
        untold = not own and any(entry["run"] == "failed" for entry in all_own)
        peaks = {batch: peak_gb([e for e in own if e["batch"] == batch]) for batch in {e["batch"] for e in own}}
        for capacity in CAPACITIES_GB:
            largest = 0
            for batch in sorted(peaks):
                limit = USABLE * capacity
                if capacity > total_gb * 1.05 or not (peaks[batch] <= limit or fits(Case(stage, base, batch), limit)):
                    break
                largest = batch
            row[f"{capacity} GB"] = largest if capacity <= total_gb * 1.05 and not untold else None
        rows.append(row)
    return rows


def table(entries: list[dict[str, Any]], size: Size, card: Card, response_length: int) -> str:
    """A row for each case.

    Args:
        entries: What `sweep` finds, of all cases.
        size: The model.
        card: What the card can do.
        response_length: Of PPO.

    Returns:
        Markdown.
    """
    cases: dict[Case, list[dict[str, Any]]] = {}
    for entry in entries:
        cases.setdefault(Case(entry["stage"], entry["base"], entry["batch"]), []).append(entry)
    return markdown([speeds(case, size, runs, card, response_length) for case, runs in cases.items()])
