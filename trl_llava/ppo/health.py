"""Checks that stop a run with an explanation, instead of letting it train on nonsense for days."""

import math

import torch

from trl_llava.errors import ExplainedError


class UnhealthyRunError(ExplainedError, RuntimeError):
    """A run that must not go on: the message says what was seen, what was expected and what to look at."""


def check_first_step_kl(kl: float, tolerance: float) -> None:
    """Before the first update, policy and reference are the same model, so their KL must be 0.

    Args:
        kl: mean KL per response, in nats.
        tolerance: largest absolute value that rounding explains.

    Raises:
        UnhealthyRunError: if it is larger.
    """
    if not abs(kl) <= tolerance:
        raise UnhealthyRunError(
            f"objective/kl is {kl:.3g} at the first step, expected 0 (within first_step_kl_tolerance={tolerance:g}): "
            "policy and reference differ before any update. Usual causes: the reference is not the adapter that the "
            "policy starts from, dropout is on, the two run in different dtypes, or recompute_logprobs: false in 16 "
            "bit, which needs a larger tolerance for the rounding of generation. Set check_first_step: false only "
            "if the reference is meant to differ"
        )


def check_first_step_ratio(ratio: torch.Tensor, mask: torch.Tensor, tolerance: float) -> None:
    """In the first micro-batch of the first update nothing has moved, so every probability ratio must be 1.

    Args:
        ratio: (B, R) new over old probability.
        mask: (B, R) bool, `True` at real tokens.
        tolerance: largest mean distance from 1 that rounding explains; in 16 bit a single token may be far off, as
            another number of rows makes another order of sums.

    Raises:
        UnhealthyRunError: if the mean distance is larger.
    """
    distance = (ratio - 1).abs()[mask].mean().item()
    if not distance <= tolerance:
        raise UnhealthyRunError(
            f"the probability ratio is off by {distance:.3g} in the first micro-batch, expected 1 (within "
            f"first_step_ratio_tolerance={tolerance:g}): the update computes other log-probabilities than the rollout "
            "did. Usual causes: dropout is on in training, another dtype or autocast in one of the passes, or padding "
            "that leaks into the attention"
        )


def check_finite(name: str, value: torch.Tensor | float, step: int, reached_weights: bool = False) -> None:
    """Stop as soon as a number is not finite, where possible before it reaches the weights.

    Args:
        name: what the value is, as the user knows it ("loss", "gradient norm", the name of a reward function).
        value: the numbers.
        step: the PPO step, counted from 1.
        reached_weights: `True` if the weights may already hold it.

    Raises:
        UnhealthyRunError: if any is NaN or infinite.
    """
    finite = bool(torch.isfinite(value).all()) if isinstance(value, torch.Tensor) else math.isfinite(value)
    if not finite:
        where = ""
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            where = f" (rows {(~torch.isfinite(value)).nonzero().flatten().tolist()} of the batch)"
        raise UnhealthyRunError(
            f"{name} is not finite at step {step}{where}: "
            f"{'go back to the last checkpoint' if reached_weights else 'no weight was changed by it'}. Usual causes: "
            "a learning rate that is too high, or a reward function that divides by zero"
        )
