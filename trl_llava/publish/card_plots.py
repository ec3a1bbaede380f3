"""The curves of a run as one PNG for its model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_ONLINE = {"Reward": "reward", "KL to the reference": "kl", "Completion length (tokens)": "completions/mean_length"}
CURVES = {
    "sft": {"Loss": "loss", "Token accuracy": "mean_token_accuracy"},
    "reward": {"Loss": "loss", "Accuracy": "accuracy", "Margin": "margin"},
    "ppo": {**_ONLINE, "Reward": "objective/scores", "KL to the reference": "objective/kl"},
    "dpo": {"Loss": "loss", "Accuracy": "rewards/accuracies", "Margin": "rewards/margins"},
    "grpo": _ONLINE,
    "rloo": _ONLINE,
}
"""Stage -> panel -> its name in the log, which has `eval_` before it on held-out rows."""

# Okabe and Ito's palette: colour-blind readers tell the two apart.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "label": "training"},
    {"color": "#D55E00", "linestyle": "--", "marker": "o", "label": "held out"},
)


def plot_curves(stage: str, log_history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the curves of a stage into a PNG file; whether there was anything to draw."""
    panels = {
        title: [
            [(entry["step"], entry[key]) for entry in log_history if key in entry] for key in (name, f"eval_{name}")
        ]
        for title, name in CURVES[stage].items()
    }
    panels = {title: curves for title, curves in panels.items() if any(curves)}
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
