"""When a run says that its policy goes astray: fields of PPO, GRPO and RLOO."""

from dataclasses import dataclass

from trl_llava.configs.stages import option, require_positive


@dataclass
class AlarmOptions:
    """Mixed into a config; `run/alarms.py` has what the fields mean as formulae."""

    alarm_length: float | None = option(
        3.0,
        "Alarm when completions get so many times shorter or longer than at the first logged step: mean length in "
        "tokens over the last 5. None: off.",
    )
    alarm_empty: float | None = option(
        0.1, "Alarm when more than this share of the completions of the last 5 logged steps is empty. None: off."
    )
    alarm_held_out: float | None = option(
        1.0,
        "Alarm when the mean score of held-out samples falls by more than so many standard deviations of the scores "
        "below that of the first samples, while the training reward has risen. None: off.",
    )
    alarm_kl: float | None = option(
        None,
        "Alarm when the KL to the reference, mean over the last 5 logged steps, is above this; in nats, as it is "
        "logged: `objective/kl` (PPO, per completion) or `kl` (GRPO, RLOO). None: off.",
    )
    stop_on_alarm: bool = option(False, "End the run at an alarm, once it has saved; a resumed run goes on past it.")


def check_alarms(config: AlarmOptions) -> None:
    """Raises `ValueError` for a bound that nothing or everything would cross."""
    require_positive(config, "alarm_held_out", "alarm_kl")
    if config.alarm_length is not None and not config.alarm_length > 1:
        raise ValueError(
            f"`alarm_length` is a factor above 1, found {config.alarm_length!r}: 3 is a third or three times."
        )
    if config.alarm_empty is not None and not 0 <= config.alarm_empty < 1:
        raise ValueError(f"`alarm_empty` is a share from 0 to below 1, found {config.alarm_empty!r}.")
    if config.alarm_kl is not None and getattr(config, "beta", None) == 0:
        raise ValueError("`alarm_kl` needs the KL, which is not computed with `beta: 0`: set `beta`, or leave it out.")
