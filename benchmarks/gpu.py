"""LLaVA-1.5-7B's real shape with random weights on a GPU: all three stages, base in bfloat16 and in NF4.

    python -m benchmarks.gpu [--json FILE] [--runs 5] [--stages sft reward ppo] [--bases bf16 nf4]

For each stage and base, the batch doubles until the card is full: tokens/s, peak memory, the share of the card's
bfloat16 peak that the step's matrix work makes up, the share of its memory bandwidth that generation reads weights and
cache at, and the largest of these batches that fits cards of 24, 48, 80 and 140 GB. Nothing is downloaded: the weights
are drawn (14 GB on disk, in a temporary folder that `--folder` moves).

Without a CUDA device the command ends with an error.
"""

import functools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ppo_sides, reward_step, sft_step
from benchmarks.gpu_work import Card, decoding_bytes, find_card, pass_flops, training_flops
from benchmarks.harness import Side, alternate, quiet, say, steps_needed
from benchmarks.rows import make_rows
from benchmarks.tables import arguments, markdown, write_json
from benchmarks.workload import Size, make_base, make_reward
from trl_llava.reward_trainer import LlavaRewardTrainer

SEVEN_B = Size(
    vocabulary=32_064, hidden=4096, layers=32, heads=32, tower_hidden=1024, tower_layers=24, question=64, rank=64
)
STAGES = ("sft", "reward", "ppo")
BASES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True},
    "nf4": {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "load_in_4bit": True},
}
"""Base -> keys of the recipe. TRL's default for 4 bit is NF4."""
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


def make_side(case: Case, size: Size, folder: Path, steps: int, response_length: int) -> Side:
    """The run of a case.

    Args:
        case: Which.
        size: The model.
        folder: Where `prepare` has put it; rows are written beside it.
        steps: How many steps are run.
        response_length: Of PPO.

    Returns:
        The side.
    """
    fields = BASES[case.base]
    if case.stage == "sft":
        sft = sft_step.Step(size, case.batch, steps=steps)
        make_rows(size, folder / "rows", case.batch * steps, {"completion": sft.answer})
        return functools.partial(sft_step.our_side, folder=folder, step=sft, **fields)
    if case.stage == "reward":
        pairs = reward_step.Step(size, case.batch, steps=steps)
        answers = {"chosen": pairs.answer, "rejected": pairs.answer}
        make_rows(size, folder / "rows", case.batch * steps, answers)
        return functools.partial(
            reward_step.side, folder=folder, step=pairs, trainer_class=LlavaRewardTrainer, judged=True, **fields
        )
    step = ppo_of(case, size, steps, response_length)
    make_rows(size, folder / "rows", case.batch, {})
    return functools.partial(ppo_sides.our_side, folder=folder, step=step, **fields)


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
    lengths = tuple(response_length * (1 + row % 4) // 4 for row in reversed(range(case.batch)))
    return ppo_sides.Step(size, lengths, response_length, micro_batch=case.batch, epochs=1, steps=steps)


def prepare(size: Size, folder: Path, device: str) -> None:
    """Write base and reward model.

    Args:
        size: The model.
        folder: Where.
        device: Where the weights are drawn.
    """
    place = {"dtype": torch.bfloat16, "device": device}
    base = make_base(size, folder / "base", **place)
    make_reward(base, size, folder / "reward", **place)


def sweep(cases: Sequence[Case], size: Size, folder: Path, runs: int, response_length: int) -> list[dict[str, Any]]:
    """Run cases of one stage and base in order of their batches, until one does not fit.

    Args:
        cases: The cases, smallest batch first.
        size: The model.
        folder: What `prepare` has written.
        runs: How many steps of each count.
        response_length: Of PPO.

    Returns:
        What `alternate` returns for each case that fits, with `stage`, `base` and `batch`.

    Raises:
        RuntimeError: If a run fails for another reason than memory.
    """
    entries = []
    for case in cases:
        name = " ".join(map(str, case))
        try:
            found = alternate({name: make_side(case, size, folder, steps_needed(runs), response_length)}, runs)
        except RuntimeError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            say(f"{name}: does not fit this card")
            break
        entries += [{**run, **case._asdict()} for run in found]
    return entries


def speeds(case: Case, size: Size, runs: list[dict[str, Any]], card: Card, response_length: int) -> dict[str, Any]:
    """A row of the table.

    Args:
        case: The case.
        size: The model.
        runs: Its runs.
        card: What the card can do.
        response_length: Of PPO.

    Returns:
        Column -> cell. Lengths are those of the workload's middle: prompts have about 40 tokens of template.
    """
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
        copies, tail = (2, 200) if case.stage == "reward" else (1, 0)  # the judging turn with captions
        rows = [round(prompt + answer + tail)] * (copies * case.batch)
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


def largest_batches(entries: list[dict[str, Any]], total_gb: float) -> list[dict[str, Any]]:
    """The largest batch of the sweep that fits cards of some sizes.

    Args:
        entries: What `sweep` returns, of all cases.
        total_gb: Memory of this card: what would fit a larger one is not known.

    Returns:
        A row for each stage and base: `24 GB` and so on -> batch, 0 if none fits, None if not known.
    """
    rows = []
    for stage, base in dict.fromkeys((entry["stage"], entry["base"]) for entry in entries):
        row: dict[str, Any] = {"stage": stage, "base": base}
        own = [entry for entry in entries if (entry["stage"], entry["base"]) == (stage, base)]
        for capacity in CAPACITIES_GB:
            fits = [
                batch
                for batch in {entry["batch"] for entry in own}
                if peak_gb([entry for entry in own if entry["batch"] == batch]) <= USABLE * capacity
            ]
            row[f"{capacity} GB"] = max(fits, default=0) if capacity <= total_gb * 1.05 else None
        rows.append(row)
    return rows


def tables(entries: list[dict[str, Any]], size: Size, card: Card, total_gb: float, response_length: int) -> str:
    """Both tables.

    Args:
        entries: What `sweep` returns, of all cases.
        size: The model.
        card: What the card can do.
        total_gb: Its memory.
        response_length: Of PPO.

    Returns:
        Markdown.
    """
    cases: dict[Case, list[dict[str, Any]]] = {}
    for entry in entries:
        cases.setdefault(Case(entry["stage"], entry["base"], entry["batch"]), []).append(entry)
    rows = [speeds(case, size, runs, card, response_length) for case, runs in cases.items()]
    return f"{markdown(rows)}\n\nLargest batch:\n\n{markdown(largest_batches(entries, total_gb))}"


def main(words: Sequence[str]) -> None:
    """Measure, and print the tables.

    Args:
        words: The command line without the program's name.

    Raises:
        SystemExit: If there is no CUDA device, or its peak is not known.
    """
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--response-length", type=int, default=256, help="limit of PPO's answers")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak, if the card is not known here")
    parser.add_argument("--bandwidth-gbs", type=float, help="memory bandwidth, if the card is not known here")
    parser.add_argument("--folder", help="where the temporary 14 GB go")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device: this benchmark measures a GPU (the others run on a CPU)")
    quiet()
    properties = torch.cuda.get_device_properties(0)
    card = find_card(properties.name, options.peak_tflops, options.bandwidth_gbs)
    total_gb = properties.total_memory / 1e9
    say(f"{properties.name}, {total_gb:.0f} GB; by its data sheet {card.tflops} TFLOP/s bfloat16, {card.gbs} GB/s")
    entries = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        prepare(SEVEN_B, Path(name), "cuda")
        torch.cuda.empty_cache()  # the sides run in processes of their own, and need all of the card
        for stage in options.stages:
            for base in options.bases:
                cases = [Case(stage, base, batch) for batch in sorted(options.batches)]
                entries += sweep(cases, SEVEN_B, Path(name), options.runs, options.response_length)
    print(tables(entries, SEVEN_B, card, total_gb, options.response_length))
    if options.json is not None:
        shares = largest_batches(entries, total_gb)
        ratios = {f"{row['stage']} {row['base']} {key}": row[key] for row in shares for key in row if "GB" in key}
        write_json(options.json, ratios, entries)


if __name__ == "__main__":
    main(sys.argv[1:])
