"""What TRL asks of a reward function, and what is read off one."""

from collections.abc import Callable, Sequence

RewardFunction = Callable[..., Sequence[float | None]]
"""TRL's signature: `prompts`, `completions`, `completion_ids` and the rows' columns -> one float (or None) per row."""


def function_name(function: RewardFunction) -> str:
    """The name a reward function has in the logs.

    Args:
        function: a reward function.

    Returns:
        Its `__name__`, or the name of its class.
    """
    return getattr(function, "__name__", type(function).__name__)


def needs_captions(reward_funcs: Sequence[RewardFunction]) -> bool:
    """Tell whether a row without captions cannot be scored.

    Args:
        reward_funcs: reward functions; one that needs captions says so with an attribute `needs_captions`.

    Returns:
        Whether one of them does.
    """
    return any(getattr(function, "needs_captions", False) for function in reward_funcs)
