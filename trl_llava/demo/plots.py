"""The demo's charts as PNG files; two colours that colour-blind readers tell apart, and two line styles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot
from matplotlib.axes import Axes

from trl_llava.demo.stages import StageRecord
from trl_llava.demo.summary import standard_error

# Okabe and Ito's palette.
STYLES = {
    "with_captions": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "reward model with captions"},
    "plain": {"color": "#D55E00", "linestyle": "--", "marker": "s", "label": "reward model without"},
}
BEFORE = "#777777"


def plot_outcome(summary: dict[str, Any], path: Path) -> None:
    """Bars: invented objects, recall and reward-model accuracy, before and after each PPO run."""
    figure, (chair, recall, accuracy) = pyplot.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    before = summary["ppo"]["plain"]["before"]
    images = summary["unseen_pictures"]
    for axes, name, title in (
        (chair, "chair", "Invented among mentioned objects"),
        (recall, "recall", "Present objects that are mentioned"),
    ):
        bars = [("SFT", before[name], BEFORE)]
        bars += [
            (label, summary["ppo"][variant]["after"][name], STYLES[variant]["color"])
            for variant, label in (("plain", "PPO,\nplain"), ("with_captions", "PPO,\ncaptions"))
        ]
        # About 3.5 objects in each image are mentioned or could be.
        _bars(axes, bars, 3.5 * images)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("share on unseen images")
    chair.set_ylim(0, before["chair"] * 1.25)
    recall.set_ylim(0, 1.08)
    shares = summary["reward_model_accuracy"]
    names = (("plain", "plain"), ("with_captions", "captions"))
    _bars(accuracy, [(label, shares[v], STYLES[v]["color"]) for v, label in names], summary["reward_model_pairs"])
    accuracy.axhline(0.5, color="black", linewidth=1, linestyle=":")
    accuracy.text(0.5, 0.515, "guessing", fontsize=8, ha="center")
    accuracy.set_ylim(0, 1.08)
    accuracy.set_ylabel("share of unseen pairs")
    accuracy.set_title("Reward model: right preferences", fontsize=10)
    _save(figure, path)


def plot_ppo(records: dict[str, StageRecord], path: Path) -> None:
    """Curves of stage 3: score, KL and length of the rollouts by step, of each variant."""
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    wanted = (
        ("objective/scores", "score (first batch = 0 +- 1)"),
        ("objective/kl", "KL from SFT (nats per answer)"),
        ("completions/mean_length", "tokens per answer"),
    )
    for axes, (name, label) in zip(panels, wanted, strict=True):
        for variant, record in records.items():
            values = [entry[name] for entry in record.log if name in entry]
            axes.plot(range(1, len(values) + 1), values, markersize=3, **STYLES[variant])
        axes.set_xlabel("PPO step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[2].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    _save(figure, path)


def plot_unseen(summary: dict[str, Any], path: Path) -> None:
    """Curves on unseen images: invented objects, recall and length of descriptions at checkpoints of PPO."""
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    labels = {
        "chair": "invented among mentioned",
        "recall": "present and mentioned",
        "length": "tokens per description",
    }
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for variant, run in summary["ppo"].items():
            steps, values = [p["step"] for p in run["curve"]], [p[name] for p in run["curve"]]
            axes.plot(steps, values, markersize=4, **STYLES[variant])
        axes.set_xlabel("PPO step (0: after SFT)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    # From 0, as a collapse must look like one and nothing else may.
    for axes, top in zip(panels, (None, 1.05, None), strict=True):
        axes.set_ylim(0, top)
    panels[0].legend(fontsize=8)
    _save(figure, path)


def plot_training(sft: StageRecord, rewards: dict[str, StageRecord], path: Path) -> None:
    """Curves of stages 1 and 2: losses by step, of each variant of stage 2."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.plot(*_losses(sft), color="#009E73", marker="o", markersize=3)
    left.set_title("Stage 1: SFT", fontsize=10)
    for variant, record in rewards.items():
        right.plot(*_losses(record), markersize=3, **STYLES[variant])
    right.axhline(0.6931, color="black", linewidth=1, linestyle=":")
    right.text(right.get_xlim()[0], 0.705, " guessing", fontsize=8)
    right.set_ylim(0, 0.9)
    right.set_title("Stage 2: reward model", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.grid(alpha=0.3)
    _save(figure, path)


def _losses(record: StageRecord) -> tuple[list[float], list[float]]:
    logged = [entry for entry in record.log if "loss" in entry]
    return [entry["step"] for entry in logged], [entry["loss"] for entry in logged]


def _bars(axes: Axes, bars: Sequence[tuple[str, float, str]], count: float) -> None:
    names, values, colours = zip(*bars, strict=True)
    errors = [standard_error(value, count) for value in values]
    drawn = axes.bar(names, values, color=colours, width=0.6, yerr=errors, capsize=4)
    axes.bar_label(drawn, [f"{value:.3f}" for value in values], fontsize=9, padding=2)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
