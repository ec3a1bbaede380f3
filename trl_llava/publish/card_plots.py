"""The curves of a run: which there are, and the first of them as one PNG for its model card."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_TRL_ONLINE = {
    "Reward": "reward",
    "KL to the reference": "kl",
    "Completion length (tokens)": "completions/mean_length",
    "Share without a stop token": "completions/clipped_ratio",
    "Share of empty completions": "completions/empty_ratio",
    "Clipped ratios": "clip_ratio/region_mean",
}
_PPO = {"Reward": "objective/scores", "KL to the reference": "objective/kl", "Clipped ratios": "policy/clipfrac_avg"}
CURVES = {
    "sft": {"Loss": "loss", "Token accuracy": "mean_token_accuracy"},
    "reward": {"Loss": "loss", "Accuracy": "accuracy", "Margin": "margin"},
    "ppo": {**_TRL_ONLINE, **_PPO},
    "dpo": {"Loss": "loss", "Accuracy": "rewards/accuracies", "Margin": "rewards/margins"},
    "grpo": _TRL_ONLINE,
    "rloo": _TRL_ONLINE,
}
"""Stage -> panel -> its name in the log, which has `eval_` before it on held-out rows."""

CARD_PANELS = 3
Points = list[tuple[int, float]]

# Okabe and Ito's palette: colour-blind readers tell the two apart.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "label": "training"},
    {"color": "#D55E00", "linestyle": "--", "marker": "o", "label": "held out"},
)


def curves_of(names: dict[str, str], log_history: Sequence[dict[str, Any]]) -> dict[str, tuple[Points, Points]]:
    """Panel -> its points in training and on held-out rows, (step, value); panels without any are left out."""
    panels = {}
    for title, name in names.items():
        training, held_out = (
            [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
            for key in (name, f"eval_{name}")
        )
        if training or held_out:
            panels[title] = (training, held_out)
    return panels


def plot_curves(stage: str, log_history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the first curves of a stage into a PNG file; whether there was anything to draw."""
    panels = dict(islice(curves_of(CURVES[stage], log_history).items(), CARD_PANELS))
    if not panels:
        return False
    figure = Figure(figsize=(3.6 * len(panels), 2.8), layout="constrained")
    for place, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for points, style in zip(curves, _STYLES, strict=True):
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, **{"marker": "o" if len(points) == 1 else None, **style})
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        if sum(map(bool, curves)) > 1:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    return True
