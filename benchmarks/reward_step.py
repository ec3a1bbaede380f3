"""One step of the reward model beside encoding both candidates of each pair whole, with the picture twice.

    python -m benchmarks.reward_step [--json FILE] [--runs 5]

The other side is what `RewardTrainer` would do with a batch that has images: 2B rows, each with its picture. Once with
the paper's judging turn and captions behind each answer, which the two candidates of a pair cannot share, and once
without. Same model, adapter, rows and batch on both sides.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import Gate, gated
from benchmarks.harness import quiet, say, side_by_side, steps_needed
from benchmarks.rows import NOTHING_ELSE, make_rows, run_stage
from benchmarks.tables import Ratio, arguments, median_of, report
from benchmarks.workload import FULL, Size, make_base
from trl_llava import train_reward
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.reward_trainer import LlavaRewardTrainer

OURS, WHOLE = "ours", "both whole"
JUDGED, BARE = " with judging turn", " without"
RATIOS = {
    "pairs_per_second_with_judging_turn": Ratio(OURS + JUDGED, WHOLE + JUDGED, "seconds", 1.6, more_is_better=True),
    "pairs_per_second_without": Ratio(OURS + BARE, WHOLE + BARE, "seconds", 1.6, more_is_better=True),
}


@dataclass(frozen=True)
class Step:
    """What one step does, the same on all sides.

    Attributes:
        size: The model and the prompts.
        pairs: Of a batch.
        answer: Fewest and most words of an answer.
        steps: How many steps are run.
    """

    size: Size = FULL
    pairs: int = 4
    answer: tuple[int, int] = (32, 96)
    steps: int = 1


class WholeCollator(PreferenceCollator):
    """`PreferenceCollator` that repeats the pictures, so that each of the 2B rows is encoded with its own."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of B pairs.

        Args:
            rows: B rows of the preference stage.

        Returns:
            What `PreferenceCollator` returns, with 2I images.
        """
        batch = super().__call__(rows)
        del batch["image_copies"]
        return {**batch, "pixel_values": torch.cat([batch["pixel_values"]] * 2)}


class WholeRewardTrainer(LlavaRewardTrainer):
    """`LlavaRewardTrainer` that encodes both candidates whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config, prompt = kwargs["args"], kwargs["judging_prompt"]
        collator = WholeCollator(kwargs["processing_class"], max_length=config.max_length, judging_prompt=prompt)
        super().__init__(*args, data_collator=collator, **kwargs)


def prepare(folder: Path, step: Step) -> None:
    """Write what all sides load.

    Args:
        folder: Where.
        step: The sizes.
    """
    make_base(step.size, folder / "base")
    make_rows(step.size, folder / "rows", step.pairs * step.steps, {"chosen": step.answer, "rejected": step.answer})


def side(
    gate: Gate, folder: Path, step: Step, trainer_class: type[LlavaRewardTrainer], judged: bool, **fields: Any
) -> None:
    """Run `trl-llava reward` as a user does, with a gate between its steps.

    Args:
        gate: The gate.
        folder: What `prepare` has written.
        step: What a step does.
        trainer_class: Our trainer, or one that differs from it.
        judged: Whether the paper's judging turn, with captions, follows each answer.
        **fields: Further keys of the recipe.
    """
    make = gated(trainer_class, gate)

    def trainer(**kwargs: Any) -> LlavaRewardTrainer:
        return make(**(kwargs if judged else {**kwargs, "judging_prompt": None}))

    train_reward.LlavaRewardTrainer = trainer
    run_stage(train_reward.main, folder, step.size, our_values(step, **fields))


def our_values(step: Step, **fields: Any) -> dict[str, Any]:
    """The recipe of our side, with further keys."""
    return {
        "per_device_train_batch_size": step.pairs,
        "max_steps": step.steps,
        "max_length": None,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        **NOTHING_ELSE,
        **fields,
    }


def measure(step: Step, runs: int) -> list[dict[str, Any]]:
    """Run all sides.

    Args:
        step: What a step does.
        runs: How many steps of each side count.

    Returns:
        What `alternate` returns.
    """
    sides = {
        label + turn: functools.partial(
            side, step=step, trainer_class=kind, judged=turn == JUDGED, share_prefix=label == OURS
        )
        for turn in (JUDGED, BARE)
        for label, kind in ((OURS, LlavaRewardTrainer), (WHOLE, WholeRewardTrainer))
    }
    return side_by_side(step, prepare, sides, runs, count=[OURS + JUDGED, WHOLE + JUDGED])


def main(words: Sequence[str]) -> None:
    """Measure, and print the tables.

    Args:
        words: The command line without the program's name.
    """
    options = arguments(__doc__.splitlines()[0]).parse_args(words)
    quiet()
    step = Step(steps=steps_needed(options.runs))
    runs = measure(step, options.runs)
    for name in dict.fromkeys(run["side"] for run in runs):
        say(f"{name}: {step.pairs / median_of(runs, name, 'seconds'):.2f} pairs/s")
    report(runs, RATIOS, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
