"""What TRL asks of a reward function, and what can be read off one."""

from collections.abc import Callable, Sequence

RewardFunction = Callable[..., Sequence[float | None]]
"""TRL's signature: `prompts`, `completions`, `completion_ids` and the rows' columns -> one float (or None) per row."""


def function_name(function: RewardFunction) -> str:
    """The name a reward function has in the logs: its `__name__`, or that of its class."""
    return getattr(function, "__name__", type(function).__name__)


def needs_captions(reward_funcs: Sequence[RewardFunction]) -> bool:
    """Whether one of them cannot score a row without captions, as its attribute `needs_captions` says."""
    return any(getattr(function, "needs_captions", False) for function in reward_funcs)
