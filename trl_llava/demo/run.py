"""The demo: `trl-llava demo [--output_dir runs/demo] [--seed 0] [--quick]`.

In:  a seed, and the base model that ships with the package.
Out: `output_dir` with the rows, the result of each stage, summary.json, report.html and before_after.png.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_llava.demo.picture import draw_before_and_after
from trl_llava.demo.report import write_report
from trl_llava.demo.stages import BASE, FULL, QUICK, Plan, Stages, say
from trl_llava.demo.summary import BONUSES, VARIANTS, summarise

CHECKPOINT_DESCRIPTIONS = 100
"""Descriptions that are sampled from a checkpoint of PPO; they only draw a curve."""
BONUS_ALONE = ("--value_init", "policy", "--correctness_coef", "2.0", "--save_strategy", "no")
"""No reward model: what the paper's bonus does when nothing weighs against it."""


def run_demo(output_dir: Path, seed: int = 0, plan: Plan = FULL, base: Path = BASE) -> dict[str, Any]:
    """Run everything and write the report into an empty or absent folder; returns what is in summary.json."""
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty (report.html there shows its demo, if it was finished). "
            "Choose another --output_dir, or empty it yourself."
        )
    start = time.perf_counter()
    stages = Stages(output_dir, seed, plan, base)
    say("Drawing images and writing questions, answers and captions ...")
    seconds = {"data": stages.prepare()}
    say("Stage 1: SFT on descriptions that mention too much ...")
    stages.train_sft()
    for variant, (reward, ppo) in VARIANTS.items():
        say(f"Stage 2: reward model, {variant.replace('_', ' ')} ...")
        record = stages.train_reward(reward)
        say(f"  prefers the better answer in {record.last('eval_accuracy'):.3f} of unseen pairs")
        say(f"Stage 3: PPO against it ({variant.replace('_', ' ')}) ...")
        stages.train_ppo(ppo, ppo, reward=reward)
    for which, result in BONUSES.items():
        say(f"Stage 3 for comparison: nothing but a bonus for right answers (yes_no: {which}) ...")
        stages.train_ppo("ppo_plain", result, *BONUS_ALONE, "--yes_no", which)
    say("Sampling answers about unseen images, before and after ...")
    before_sampling = time.perf_counter()
    for result in ("sft", *(ppo for _, ppo in VARIANTS.values()), *BONUSES.values()):
        stages.evaluate(result)
    for _, ppo in VARIANTS.values():
        for folder in sorted((output_dir / ppo).glob("checkpoint-*")):
            if int(folder.name.partition("-")[2]) < stages.records[ppo].steps:
                stages.evaluate(f"{ppo}/{folder.name}", CHECKPOINT_DESCRIPTIONS)
    seconds["evaluation"] = time.perf_counter() - before_sampling
    seconds["total"] = time.perf_counter() - start
    summary = summarise(stages, seconds, {"data": seed, "stages": seed})
    summary |= {"quick": plan is not FULL, "base": base.name, "threads": torch.get_num_threads()}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report(stages, summary, output_dir / "report.html")
    draw_before_and_after(stages, output_dir / "before_after.png")
    return summary


def table(summary: dict[str, Any]) -> str:
    """The outcome in a few lines for the terminal."""
    columns = ("chair", "invented", "recall", "yes_accuracy", "no_accuracy", "choice_accuracy", "length")
    rows = [("after SFT", summary["ppo"]["plain"]["before"])]
    rows += [(f"after PPO, {v.replace('_', ' ')}", summary["ppo"][v]["after"]) for v in ("plain", "with_captions")]
    head = " " * 26 + "".join(f"{name:>16}" for name in columns)
    return "\n".join([head, *(f"{label:26}" + "".join(f"{m[c]:16.3f}" for c in columns) for label, m in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run the demo; returns 0, or 2 if the output folder cannot be used."""
    parser = argparse.ArgumentParser(prog="trl-llava demo", description="Train the three stages on a drawn world.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="must be empty or absent")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows and stages (default 0)")
    parser.add_argument("--quick", action="store_true", help="one minute: fewer steps, same path")
    args = parser.parse_args(argv)
    # Matrices this small gain nothing from a second thread, and wait long for it where the other core is busy.
    torch.set_num_threads(1)
    try:
        summary = run_demo(args.output_dir, args.seed, QUICK if args.quick else FULL)
    except FileExistsError as error:
        say(f"error: {error}")
        return 2
    print(table(summary))
    print(f"{summary['seconds']['total']:.0f} seconds; open {args.output_dir / 'report.html'}")
    return 0
