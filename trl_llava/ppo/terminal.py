"""What PPO shows of a step on the terminal: one short line; trackers and trainer_state.json get every number."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

SHOWN = {
    "objective/scores": "score",
    "objective/kl": "KL",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut",
    "loss/value_avg": "value loss",
    "val/ratio": "ratio",
    "time/step": "seconds",
}
"""Metrics of a step, and what a line calls them."""


def line_of(logs: dict[str, Any], state: TrainerState) -> str:
    """The line for what is logged.

    >>> state = TrainerState(global_step=3, max_steps=18)
    >>> line_of({"objective/scores": -0.58284, "objective/kl": 0.00095, "lr": 3e-05}, state)
    'step 3/18: score -0.583, KL 0.00095'
    >>> line_of({"eval_objective/scores": 0.25, "step": 3}, state)
    'step 3/18: eval_objective/scores 0.25'
    """
    shown = {name: logs[key] for key, name in SHOWN.items() if key in logs}
    if not shown:
        shown = {key: value for key, value in logs.items() if key not in ("step", "epoch", "total_flos")}
    texts = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items())
    return f"step {state.global_step}/{state.max_steps}: {', '.join(texts)}"


class ShortProgress(ProgressCallback):
    """Transformers' progress bar, with short lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(line_of(logs, state))


class ShortPrinter(PrinterCallback):
    """The same without a bar, with `disable_tqdm`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line."""
        if state.is_local_process_zero and logs:
            print(line_of(logs, state))


def shorten_lines(trainer: Trainer) -> None:
    """Put the short lines in the place of transformers' own callbacks, where those are there; a notebook's stays."""
    for long, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
        if any(type(callback) is long for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(long)
            trainer.add_callback(short)
