"""One step of SFT beside TRL's `SFTTrainer` with TRL's own collator for images.

    python -m benchmarks.sft_step [--json FILE] [--runs 5]

Same model, adapter, rows and batch on both sides, labels on the answer alone. TRL's collator encodes prompt and answer
apart and pads between them; ours encodes the conversation once.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List
from trl import SFTConfig, SFTTrainer

from benchmarks.gate import Gate, gated
from benchmarks.harness import quiet, side_by_side, steps_needed
from benchmarks.rows import NOTHING_ELSE, make_rows, run_stage
from benchmarks.tables import Ratio, arguments, report
from benchmarks.workload import FULL, Size, lora, make_base
from trl_llava import train_sft
from trl_llava.models.load import load_processor
from trl_llava.sft_trainer import LlavaSFTTrainer

OURS, TRL = "ours", "trl"
RATIOS = {
    "time_vs_trl": Ratio(OURS, TRL, "seconds", 1.0),
    "peak_memory_vs_trl": Ratio(OURS, TRL, "peak_mib"),
}


@dataclass(frozen=True)
class Step:
    """What one step does, the same on both sides.

    Attributes:
        size: The model and the prompts.
        rows: Of a batch.
        answer: Fewest and most words of an answer.
        steps: How many steps are run.
    """

    size: Size = FULL
    rows: int = 4
    answer: tuple[int, int] = (32, 96)
    steps: int = 1

    def values(self) -> dict[str, Any]:
        """Config fields that TRL's and our trainer have in common."""
        return {
            "per_device_train_batch_size": self.rows,
            "max_steps": self.steps,
            "max_length": None,
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            **NOTHING_ELSE,
        }


def prepare(folder: Path, step: Step) -> None:
    """Write what both sides load.

    Args:
        folder: Where.
        step: The sizes.
    """
    make_base(step.size, folder / "base")
    make_rows(step.size, folder / "rows", step.rows * step.steps, {"completion": step.answer})


def our_side(gate: Gate, folder: Path, step: Step, **fields: Any) -> None:
    """Run `trl-llava sft` as a user does, with a gate between its steps.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
        **fields: Further keys of the recipe.
    """
    train_sft.LlavaSFTTrainer = gated(LlavaSFTTrainer, gate)
    run_stage(train_sft.main, folder, step.size, our_values(step, **fields))


def our_values(step: Step, **fields: Any) -> dict[str, Any]:
    """The recipe of our side, with further keys; the default dropout of a recipe is 0.05, that of TRL's side 0."""
    return {"lora_dropout": 0.0, **step.values(), **fields}


def trl_side(gate: Gate, folder: Path, step: Step, dtype: str = "float32", **fields: Any) -> None:
    """Run TRL's trainer on the same rows.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
        dtype: Of the base.
        **fields: Further fields of its config.
    """
    with tempfile.TemporaryDirectory(dir=folder) as output:
        gated(SFTTrainer, gate)(
            model=str(folder / "base"),
            args=SFTConfig(output_dir=output, model_init_kwargs={"dtype": dtype}, **{**step.values(), **fields}),
            train_dataset=trl_rows(folder),
            processing_class=load_processor(str(folder / "base")),
            peft_config=lora(step.size),
        ).train()


def trl_rows(folder: Path) -> Dataset:
    """The rows as TRL takes them.

    Args:
        folder: What `prepare` has written.

    Returns:
        `images`, decoded when they are asked for, `prompt` and `completion`.
    """
    rows = [json.loads(line) for line in (folder / "rows" / "rows.jsonl").read_text().splitlines()]
    table = {
        "images": [[str(folder / "rows" / name) for name in row["images"]] for row in rows],
        **{column: [row[column] for row in rows] for column in ("prompt", "completion")},
    }
    return Dataset.from_dict(table).cast_column("images", List(Image()))


def measure(step: Step, runs: int) -> list[dict[str, Any]]:
    """Run both sides.

    Args:
        step: What a step does.
        runs: How many steps of each side count.

    Returns:
        What `alternate` returns.
    """
    sides = {OURS: functools.partial(our_side, step=step), TRL: functools.partial(trl_side, step=step)}
    return side_by_side(step, prepare, sides, runs, count=list(sides))


def main(words: Sequence[str]) -> None:
    """Measure, and print the tables.

    Args:
        words: The command line without the program's name.
    """
    options = arguments(__doc__.splitlines()[0]).parse_args(words)
    quiet()
    report(measure(Step(steps=steps_needed(options.runs)), options.runs), RATIOS, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
