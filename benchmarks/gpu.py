"""LLaVA-1.5-7B's real shape with random weights on a GPU: all three stages, base in bfloat16 and in NF4.

    python -m benchmarks.gpu [--json FILE] [--runs 5] [--stages sft reward ppo] [--bases bf16 nf4]

For each stage and base, the batch doubles until the card is full: tokens/s, peak memory, the share of the card's
bfloat16 peak that the step's matrix work makes up, the share of its memory bandwidth that generation reads weights and
cache at, and the largest of these batches that fits cards of 24, 48, 80 and 140 GB: what took more of this card is
tried again with PyTorch kept to what such a card has. Nothing is downloaded: the weights are drawn (14 GB on disk, in
a temporary folder that `--folder` moves).

`--json` is written anew after every case, so that a run that is cut off has lost none that was done. SIGTERM and a
fault of the benchmark itself still print the table. A case that fails for another reason than memory is a row that
says so, what it raised is printed, and the sweep goes on with the next stage or base; the command then ends with
status 1.

Without a CUDA device the command ends with an error.
"""

import argparse
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ppo_sides, reward_step, sft_step
from benchmarks.gate import Gate
from benchmarks.gpu_tables import Case, largest_batches, ppo_of, table
from benchmarks.gpu_work import Card, find_card
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
OUT_OF_MEMORY = ("OutOfMemoryError", "STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")
"""What a traceback says of a case that does not fit: PyTorch's own words, cuBLAS's and cuDNN's, and the driver's."""
DISK_GB = 16
"""The base in bfloat16, and the reward model's adapter in float32."""


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
    make_rows(size, folder / "rows", case.batch * steps, {})
    return functools.partial(ppo_sides.our_side, folder=folder, step=step, **fields)


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


def limited(gate: Gate, side: Side, gb: float) -> None:
    """Run a side with no more of the GPU's memory than a smaller card would give it.

    Args:
        gate: The gate.
        side: The side.
        gb: 10^9 bytes.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = min(total, int(gb * 1e9))
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    # Generation sizes its batches by what is free, and shall not see the rest of the large card.
    torch.cuda.mem_get_info = lambda device=None: (allowed - torch.cuda.memory_reserved(device), allowed)
    side(gate)


def run_case(
    case: Case, size: Size, folder: Path, runs: int, response_length: int, gb: float | None = None
) -> list[dict[str, Any]]:
    """Run a case.

    Args:
        case: Which.
        size: The model.
        folder: What `prepare` has written.
        runs: How many steps count.
        response_length: Of PPO.
        gb: What PyTorch may take of the card, in 10^9 bytes; None for all.

    Returns:
        What `alternate` returns, with `stage`, `base` and `batch`; nothing if the case does not fit.

    Raises:
        RuntimeError: If the run fails for another reason than memory.
    """
    name = " ".join(map(str, case)) + (f" in {gb:.0f} GB" if gb is not None else "")
    side = make_side(case, size, folder, steps_needed(runs), response_length)
    if gb is not None:
        side = functools.partial(limited, side=side, gb=gb)
    try:
        found = alternate({name: side}, runs)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        say(f"{name}: does not fit")
        return []
    return [{**run, **case._asdict()} for run in found]


def sweep(
    cases: Sequence[Case],
    run: Callable[[Case], list[dict[str, Any]]],
    entries: list[dict[str, Any]],
    note: Callable[[], None] = lambda: None,
) -> None:
    """Run cases of one stage and base in order of their batches, until one does not fit or fails.

    Args:
        cases: The cases, smallest batch first.
        run: Runs one of them.
        entries: What is found is added here, case by case; one that does not fit or fails has `seconds` None.
        note: Called after each case.
    """
    for case in cases:
        try:
            found = run(case)
            nothing = {"run": "does not fit"}
        except RuntimeError as error:
            found, nothing = [], failed(case, error)
        entries += found or [{**case._asdict(), "side": str(case), "seconds": None, **nothing}]
        note()
        if not found:
            break


def failed(case: Case, error: RuntimeError) -> dict[str, str]:
    """Say why a case failed.

    Args:
        case: Which.
        error: With the traceback of its process as its text.

    Returns:
        `run` and, in its last line, the `error`.
    """
    say(f"{case} failed:\n{error}")
    return {"run": "failed", "error": str(error).strip().splitlines()[-1]}


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
    if torch.cuda.device_count() > 1:  # a trainer would split its batches over all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured is still printed
    quiet()
    properties = torch.cuda.get_device_properties(0)
    card = find_card(properties.name, options.peak_tflops, options.bandwidth_gbs)
    total_gb = properties.total_memory / 1e9
    say(f"{properties.name}, {total_gb:.0f} GB; by its data sheet {card.tflops} TFLOP/s bfloat16, {card.gbs} GB/s")
    measure(options, card, total_gb)


def measure(options: argparse.Namespace, card: Card, total_gb: float) -> None:
    """Run the sweep, and print and write what it found, also where it ends with a fault.

    Args:
        options: The command line.
        card: What the card can do.
        total_gb: Its memory.

    Raises:
        SystemExit: If the disk is too small, the models cannot be written, or a case fails.
    """
    entries: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}

    def note() -> None:
        if options.json is not None:
            write_json(options.json, ratios, entries)

    note()  # a file that cannot be written shall be known now
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        draw_models(Path(name))
        run = functools.partial(
            run_case, size=SEVEN_B, folder=Path(name), runs=options.runs, response_length=options.response_length
        )

        def fits(case: Case, gb: float) -> bool:
            try:
                return bool(run(case, runs=1, gb=gb))
            except RuntimeError as error:
                faults.append(failed(case, error)["error"])
                return False

        faults: list[str] = []
        try:
            for stage in options.stages:
                for base in options.bases:
                    sweep([Case(stage, base, batch) for batch in sorted(options.batches)], run, entries, note)
            shares = largest_batches(entries, total_gb, fits)
            say(f"\nLargest batch:\n\n{markdown(shares)}\n")
            ratios |= {f"{row['stage']} {row['base']} {key}": row[key] for row in shares for key in row if "GB" in key}
        finally:
            if entries:
                print(table(entries, SEVEN_B, card, options.response_length), flush=True)
            note()
    faults += [entry["error"] for entry in entries if "error" in entry]
    if faults:
        raise SystemExit(f"error: {len(faults)} cases failed, see above: {'; '.join(dict.fromkeys(faults))}")


def draw_models(folder: Path) -> None:
    """Write the models, in a process of its own: what it leaves on the card would be missing in those of the sides.

    Args:
        folder: Where.

    Raises:
        SystemExit: If the disk is too small, or the process fails.
    """
    free = shutil.disk_usage(folder).free / 1e9
    if free < DISK_GB:
        raise SystemExit(f"error: the models take {DISK_GB} GB, but {folder} has {free:.0f} GB free: give --folder")
    drawing = multiprocessing.get_context("spawn").Process(target=prepare, args=(SEVEN_B, folder, "cuda"))
    drawing.start()
    drawing.join()
    if drawing.exitcode:
        raise SystemExit(f"error: the models could not be written (exit code {drawing.exitcode}); see above")


if __name__ == "__main__":
    main(sys.argv[1:])
