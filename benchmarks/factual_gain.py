"""What captions add to the reward model: the demo over three seeds, with weak and with sharp eyes.

    python -m benchmarks.factual_gain [--seeds 0 1 2] [--output_dir runs/factual_gain] [--json FILE] [--quick]

For each seed: one SFT policy; reward models with and without captions that see 12 pixels (weak eyes) or 48 (sharp);
PPO against each of them and against the true score; and PPO with the paper's bonus for a right "No" or with the same
bonus for "Yes" too, once beside the weak-eyed plain reward model and once alone.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_llava.demo.stages import FULL, QUICK, Plan, Stages, say
from trl_llava.run.output_dir import versions

REWARDS = {
    "weak eyes, plain": ("reward_plain", False),
    "weak eyes, captions": ("reward", False),
    "sharp eyes, plain": ("reward_plain", True),
    "sharp eyes, captions": ("reward", True),
}
BONUS = ("--correctness_coef", "2.0", "--yes_no")
BONUSES = {"No": "no_only", "Yes and No": "both"}
MEASURES = ("chair", "invented", "recall", "yes_accuracy", "no_accuracy", "choice_accuracy", "length")


def run_seed(folder: Path, seed: int, plan: Plan) -> dict[str, dict[str, float]]:
    """Run everything for one seed.

    Args:
        folder: Must be empty or absent.
        seed: Seed of rows and stages.
        plan: How much of everything.

    Returns:
        Row of the table -> measures; `accuracy` is the reward model's.
    """
    stages = Stages(folder, seed, plan)
    stages.prepare()
    say(f"seed {seed}: SFT")
    stages.train_sft()
    rows: dict[str, dict[str, Any]] = {"SFT": measures(stages, "sft")}
    for label, (recipe, sharp) in REWARDS.items():
        say(f"seed {seed}: {label}")
        record = stages.train_reward(recipe, sharp=sharp)
        reward = recipe + "_sharp" * sharp
        ppo = reward.replace("reward", "ppo")
        stages.train_ppo(recipe.replace("reward", "ppo"), ppo, reward=reward)
        rows[f"PPO, {label}"] = measures(stages, ppo) | {"accuracy": record.last("eval_accuracy")}
    say(f"seed {seed}: the true score")
    truth = ("--reward_funcs", "trl_llava.demo.true_score:true_score", "--value_init", "policy")
    stages.train_ppo("ppo", "ppo_truth", *truth)
    rows["PPO, the true score"] = measures(stages, "ppo_truth")
    for label, yes_no in BONUSES.items():
        say(f"seed {seed}: bonus for {label}")
        stages.train_ppo("ppo_plain", f"ppo_with_{yes_no}", *BONUS, yes_no, reward="reward_plain")
        rows[f"PPO, weak eyes, plain, and a bonus for {label}"] = measures(stages, f"ppo_with_{yes_no}")
        stages.train_ppo("ppo_plain", f"ppo_alone_{yes_no}", *BONUS, yes_no, "--value_init", "policy")
        rows[f"PPO, nothing but a bonus for {label}"] = measures(stages, f"ppo_alone_{yes_no}")
    return rows


def measures(stages: Stages, result: str) -> dict[str, Any]:
    """Ask a policy about the unseen pictures.

    Args:
        stages: The stages of one seed.
        result: Name of the policy's folder.

    Returns:
        Measures by name.
    """
    return stages.evaluate(result).quality.as_dict()


def table(seeds: dict[int, dict[str, dict[str, float]]]) -> str:
    """Mean and spread over the seeds.

    Args:
        seeds: Seed -> rows.

    Returns:
        A table in Markdown; the number after +- is the standard deviation over the seeds.
    """
    columns = ("accuracy", *MEASURES)
    lines = [f"| | reward-model accuracy | {' | '.join(m.replace('_', ' ') for m in MEASURES)} |", "|---" * 9 + "|"]
    for label in next(iter(seeds.values())):
        cells = []
        for column in columns:
            values = [rows[label][column] for rows in seeds.values() if column in rows[label]]
            cells.append(_cell(values))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, run all seeds, print the table.

    Args:
        argv: The command line without the program's name; None takes `sys.argv`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/factual_gain"), help="must be empty or absent")
    parser.add_argument("--json", type=Path, help="also write all numbers into this file")
    parser.add_argument("--quick", action="store_true", help="little of everything: that it runs, not what it gains")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: choose another --output_dir, or empty it yourself")
    torch.set_num_threads(1)  # as the demo does
    seeds = {}
    for seed in args.seeds:
        seeds[seed] = run_seed(args.output_dir / f"seed_{seed}", seed, QUICK if args.quick else FULL)
        if args.json:
            args.json.write_text(json.dumps({"seeds": seeds, "versions": versions()}, indent=2) + "\n")
    print(table(seeds))


if __name__ == "__main__":
    main()
