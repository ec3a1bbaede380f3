"""summary.json: what the demo measured, and whether that is what it promises."""

import math
from typing import Any

from trl_llava.demo.metrics import Truthfulness, known, measure
from trl_llava.demo.stages import WEAK_EYES, Stages
from trl_llava.demo.world import SIZE
from trl_llava.run.versions import versions

VARIANTS = {"with_captions": ("reward", "ppo"), "plain": ("reward_plain", "ppo_plain")}
"""Variant -> results of stage 2 and stage 3."""
BONUSES = {"no_only": "ppo_bonus_no", "both": "ppo_bonus_both"}
"""`yes_no` -> result of a PPO whose only reward is the correctness term."""


def summarise(stages: Stages, seconds: dict[str, float], seeds: dict[str, int]) -> dict[str, Any]:
    """Collect what a finished demo measured for a JSON file; `seconds` are those of everything that is no stage."""
    before = stages.evaluations["sft"].quality
    runs = {variant: _ppo(stages, ppo, before) for variant, (_, ppo) in VARIANTS.items()}
    return {
        "seeds": seeds,
        "versions": versions(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "stages": {
            name: {"seconds": record.seconds, "steps": record.steps, "command": record.command}
            for name, record in stages.records.items()
        },
        "eyes": {"policy_pixels": SIZE, "reward_model_pixels": WEAK_EYES},
        "unseen_pictures": stages.plan.sizes.unseen,
        "reward_model_accuracy": {
            variant: stages.records[reward].last("eval_accuracy") for variant, (reward, _) in VARIANTS.items()
        },
        "reward_model_pairs": stages.plan.sizes.preference_test,
        "ppo": runs,
        "bonus_alone": {which: stages.evaluations[result].quality.as_dict() for which, result in BONUSES.items()},
        "goals": {variant: goals(before, stages.evaluations[ppo].quality) for variant, (_, ppo) in VARIANTS.items()}
        | {"captions_beat_plain": runs["with_captions"]["after"]["chair"] < runs["plain"]["after"]["chair"]},
    }


def goals(before: Truthfulness, after: Truthfulness) -> dict[str, bool]:
    """What PPO has to reach on unseen images, and whether it does."""
    return {
        "invented_objects_at_most_half": known(after.chair) <= known(before.chair) / 2,
        "recall_loses_at_most_5_points": known(after.recall) >= known(before.recall) - 0.05,
        "length_at_least_two_thirds": known(after.length) >= known(before.length) * 2 / 3,
        "yes_and_no_above_chance": min(known(after.yes_accuracy), known(after.no_accuracy)) > 0.5,
    }


def standard_error(share: float, count: float) -> float:
    """Standard error of a share of `count`: `sqrt(share * (1 - share) / count)`."""
    return math.sqrt(share * (1 - share) / max(count, 1))


def curve(stages: Stages, ppo: str) -> list[dict[str, float]]:
    """How a policy does on unseen images, from stage 1 over its checkpoints to its end; descriptions only.

    Checkpoints saw fewer images.
    """
    points = {0: stages.evaluations["sft"], stages.records[ppo].steps: stages.evaluations[ppo]}
    for result, found in stages.evaluations.items():
        if result.startswith(f"{ppo}/checkpoint-"):
            points[int(result.rpartition("-")[2])] = found
    qualities = ((step, measure([a for a in points[step].answers if a.kind == "describe"])) for step in sorted(points))
    return [
        {"step": step, "chair": known(q.chair), "recall": known(q.recall), "length": known(q.length)}
        for step, q in qualities
    ]


def _ppo(stages: Stages, ppo: str, before: Truthfulness) -> dict[str, Any]:
    record = stages.records[ppo]
    return {
        "before": before.as_dict(),
        "after": stages.evaluations[ppo].quality.as_dict(),
        "kl": record.last("objective/kl"),
        "curve": curve(stages, ppo),
    }
