"""What captions add to the reward model: the demo over three seeds, with weak and with sharp eyes.

    python -m benchmarks.factual_gain [--seeds 0 1 2] [--output_dir runs/factual_gain] [--json FILE] [--quick]
    python -m benchmarks.factual_gain --terms [...]

For each seed: one SFT policy; reward models with and without captions that see 12 pixels (weak eyes) or 48 (sharp);
PPO against each of them and against the true score; and PPO with the paper's bonus for a right "No" or with the same
bonus for "Yes" too, once beside the weak-eyed plain reward model and once alone.

`--terms` runs an ablation instead: the weak-eyed reward model with captions and the penalty for a missing stop, and
what changes when one of the paper's terms is added or taken away. All variants of a seed share its SFT policy and
reward models.
"""

import argparse
import json
import math
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
TERMS: dict[str, tuple[str, ...]] = {
    "captions": (),
    "no captions": (),
    "captions, no penalty for a missing stop": ("--missing_eos_penalty", "null"),
    "captions, length penalty": ("--length_coef", "-2.0"),
    "captions, bonus for No": (*BONUS, "no_only"),
    "captions, bonus for Yes and No": (*BONUS, "both"),
    "captions, length penalty, bonus for No": ("--length_coef", "-2.0", *BONUS, "no_only"),
}
"""What each row of the ablation says to PPO; the first is what the others are compared with."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Seeds -> the 0.975 quantile of Student's t with one degree of freedom less."""
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


def run_terms(folder: Path, seed: int, plan: Plan) -> dict[str, dict[str, float]]:
    """Run the ablation for one seed in an empty or absent folder; returns row of the table -> measures."""
    stages = Stages(folder, seed, plan)
    stages.prepare()
    say(f"seed {seed}: SFT and reward models")
    stages.train_sft()
    rows: dict[str, dict[str, Any]] = {"SFT": measures(stages, "sft")}
    accuracy = {reward: stages.train_reward(reward).last("eval_accuracy") for reward in ("reward", "reward_plain")}
    for index, (label, words) in enumerate(TERMS.items()):
        say(f"seed {seed}: {label}")
        reward, ppo = ("reward_plain", "ppo_plain") if label == "no captions" else ("reward", "ppo")
        record = stages.train_ppo(ppo, f"ppo_{index}", *words, "--save_strategy", "no", reward=reward)
        rows[label] = measures(stages, f"ppo_{index}") | {"accuracy": accuracy[reward]}
        rows[label]["unfinished"] = record.last("completions/clipped_ratio")
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


def table(seeds: dict[int, dict[str, dict[str, float]]], interval: bool = False) -> str:
    """Mean and spread over the seeds.

    Args:
        seeds: Seed -> rows.
        interval: Give half the width of the 95 % t-interval of the mean instead of the standard deviation.

    Returns:
        A table in Markdown; the number after +- is the spread.
    """
    columns = ("accuracy", *MEASURES, *(("unfinished",) if interval else ()))
    names = ("reward-model accuracy", *(column.replace("_", " ") for column in columns[1:]))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for label in next(iter(seeds.values())):
        cells = []
        for column in columns:
            values = [rows[label][column] for rows in seeds.values() if column in rows[label]]
            cells.append(_cell(values, interval))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(seeds: dict[int, dict[str, dict[str, float]]]) -> str:
    """What each variant's measures are more than those of the first of `TERMS` with the same seed.

    Args:
        seeds: Seed -> rows.

    Returns:
        A table in Markdown; after +- half the width of the 95 % t-interval of the mean difference.
    """
    first, *others = TERMS
    paired = {
        seed: {label: {m: rows[label][m] - rows[first][m] for m in MEASURES} for label in others}
        for seed, rows in seeds.items()
    }
    return table(paired, interval=True)


def half_width(values: list[float]) -> float:
    """Half the width of the 95 % t-interval of a mean of 2 to 10 values."""
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def _cell(values: list[float], interval: bool) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} +- {half_width(values) if interval else statistics.stdev(values):.3f}"


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
    parser.add_argument("--terms", action="store_true", help="the ablation of the paper's terms, with intervals")
    args = parser.parse_args(argv)
    if args.terms and len(args.seeds) > max(T_95):
        parser.error(f"--terms has intervals for at most {max(T_95)} --seeds, found {len(args.seeds)}")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: choose another --output_dir, or empty it yourself")
    torch.set_num_threads(1)  # as the demo does
    run = run_terms if args.terms else run_seed
    seeds = {}
    for seed in args.seeds:
        seeds[seed] = run(args.output_dir / f"seed_{seed}", seed, QUICK if args.quick else FULL)
        if args.json:
            args.json.write_text(json.dumps({"seeds": seeds, "versions": versions()}, indent=2) + "\n")
    print(table(seeds, interval=args.terms))
    if args.terms:
        print(f"\nMore than {next(iter(TERMS))!r} with the same seed:\n\n{differences(seeds)}")


if __name__ == "__main__":
    main()
