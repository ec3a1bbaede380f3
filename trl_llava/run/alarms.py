"""Alarms: signs that a policy goes astray, read off the log of a run; each is said once and kept in alarms.json."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_llava.configs.alarms import AlarmOptions
from trl_llava.run.atomic_files import write_atomically

logger = logging.getLogger(__name__)

ALARMS_FILE = "alarms.json"
"""In the folder of a run, if there was an alarm: a list of `Alarm`."""

WINDOW = 5
"""Over how many logged steps a mean is taken; no alarm comes before there are so many."""

# What PPO logs, and what TRL's trainers do.
_LENGTH = ("completions/mean_length",)
_EMPTY = ("completions/empty_ratio",)
_KL = ("objective/kl", "kl")
_REWARD = ("objective/scores", "reward")
_HELD_OUT = ("eval_objective/scores", "eval_reward")


class Alarm(TypedDict):
    """One alarm: after which step, which of `length`, `empty`, `held_out` and `kl`, and one line about it."""

    step: int
    alarm: str
    message: str


def length_alarm(lengths: Sequence[float], factor: float) -> str | None:
    """Whether completions have become `factor` times shorter or longer; `lengths` are means by step, in tokens.

    >>> length_alarm([12.0, 3.0, 3.0, 3.0, 3.0, 3.0], 3.0).split(":")[0]
    'completions have 3.0 tokens on average over the last 5 logged steps and had 12.0 at the first'
    >>> length_alarm([12.0, 1.0, 1.0, 1.0, 1.0], 3.0)  # too few steps
    """
    if len(lengths) <= WINDOW:
        return None
    first, now = lengths[0], fmean(lengths[-WINDOW:])
    if first / factor <= now <= first * factor:
        return None
    return (
        f"completions have {now:.1f} tokens on average over the last {WINDOW} logged steps and had {first:.1f} at the "
        f"first: more than {factor:g} times {'fewer' if now < first else 'more'} (alarm_length). Read the samples in "
        "completions/, and see whether the reward pays for length"
    )


def empty_alarm(shares: Sequence[float], bound: float) -> str | None:
    """Whether too many completions are empty; `shares` are by step, from 0 to 1."""
    if len(shares) < WINDOW or (now := fmean(shares[-WINDOW:])) <= bound:
        return None
    return (
        f"{now:.1%} of the completions of the last {WINDOW} logged steps are empty, more than {bound:.1%} "
        "(alarm_empty). Look at what the reward gives an empty completion, and at the penalty for length"
    )


def kl_alarm(kl: Sequence[float], bound: float) -> str | None:
    """Whether the policy has moved too far from its reference; `kl` is by step, in nats."""
    if len(kl) < WINDOW or (now := fmean(kl[-WINDOW:])) <= bound:
        return None
    return (
        f"the KL to the reference is {now:.2f} nats on average over the last {WINDOW} logged steps, more than "
        f"{bound:g} (alarm_kl). Read the samples in completions/; a lower learning rate or a higher weight of the KL "
        "keeps the policy closer"
    )


def held_out_alarm(held_out: Sequence[tuple[float, float]], rewards: Sequence[float], bound: float) -> str | None:
    """Whether held-out scores fall while the training reward rises.

    `held_out` holds mean and standard deviation of the scores at each evaluation, `rewards` the mean by step. The fall
    counts in standard deviations: sqrt((first^2 + last^2) / 2), of the first and the last evaluation.
    """
    if len(held_out) < 2 or len(rewards) <= WINDOW:
        return None
    (first, first_std), (now, now_std) = held_out[0], held_out[-1]
    spread = math.sqrt((first_std**2 + now_std**2) / 2)
    start, end = fmean(rewards[:WINDOW]), fmean(rewards[-WINDOW:])
    if first - now <= bound * spread or end <= start:
        return None
    return (
        f"held-out samples score {now:.3f} on average and scored {first:.3f} at first, a fall of more than {bound:g} "
        f"standard deviations ({spread:.3f}; alarm_held_out), while the training reward rose from {start:.3f} to "
        f"{end:.3f}. Read the samples in completions/: the policy may have learnt the reward's weak spots, or the "
        "training prompts by heart"
    )


def crossed(history: Sequence[dict[str, Any]], bounds: AlarmOptions) -> dict[str, str]:
    """The alarms of a log by name, each with its message."""
    held_out = [
        (entry[name], entry[f"{name}_std"])
        for entry in history
        for name in _HELD_OUT
        if _known(entry, name) and _known(entry, f"{name}_std")
    ]
    found = {
        "length": bounds.alarm_length and length_alarm(_series(history, _LENGTH), bounds.alarm_length),
        "empty": None if bounds.alarm_empty is None else empty_alarm(_series(history, _EMPTY), bounds.alarm_empty),
        "held_out": bounds.alarm_held_out
        and held_out_alarm(held_out, _series(history, _REWARD), bounds.alarm_held_out),
        "kl": bounds.alarm_kl and kl_alarm(_series(history, _KL), bounds.alarm_kl),
    }
    return {name: message for name, message in found.items() if isinstance(message, str)}


def _series(history: Sequence[dict[str, Any]], names: tuple[str, ...]) -> list[float]:
    return [entry[name] for entry in history for name in names if _known(entry, name)]


def _known(entry: dict[str, Any], name: str) -> bool:
    """Whether a metric is there; TRL logs None where no reward function has an opinion."""
    return entry.get(name) is not None and math.isfinite(entry[name])


def read_alarms(folder: Path) -> list[Alarm]:
    """The alarms of a run so far."""
    file = folder / ALARMS_FILE
    alarms: list[Alarm] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return alarms


class Alarms(TrainerCallback):
    """Says an alarm once in the life of a run, and with `stop_on_alarm` ends the training after a save.

    Attributes:
        stopping: The message of the alarm that ends the run; `None` while it goes on.
    """

    def __init__(self) -> None:
        self.said: list[Alarm] = []
        self.stopping: str | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reads what was said before a resume; on all processes what the first one finds, or one would stop alone."""
        self.said = broadcast_object_list([read_alarms(Path(args.output_dir))])[0]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the log, which is the same on all processes."""
        known = {alarm["alarm"] for alarm in self.said}
        for name, message in crossed(state.log_history, args).items():
            if name in known:
                continue
            self.said.append({"step": state.global_step, "alarm": name, "message": message})
            if state.is_world_process_zero:
                text = json.dumps(self.said, indent=2, ensure_ascii=False)
                write_atomically(Path(args.output_dir) / ALARMS_FILE, f"{text}\n")
                logger.warning("alarm after step %d: %s.", state.global_step, message)
            if args.stop_on_alarm:
                self.stopping = message
                control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps a run that is stopped within an epoch from what is due at its end."""
        if self.stopping is not None:
            control.should_save = control.should_evaluate = control.should_log = False
