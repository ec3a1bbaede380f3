"""Checks that stop a run with an explanation, instead of letting it train on nonsense for days."""

import math
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from transformers import Trainer

from trl_llava.errors import ExplainedError


class UnhealthyRunError(ExplainedError, RuntimeError):
    """A run that must not go on: the message says what was found, what was expected and what to check."""


def check_first_step_kl(kl: float, tolerance: float) -> None:
    """Before the first update, policy and reference are the same model: the mean KL in nats per response must be 0."""
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

    `ratio` (B, R) is new over old probability, `mask` (B, R) bool is `True` at real tokens. The mean distance from 1
    counts: in 16 bit a single token may be far off, as another number of rows makes another order of sums.
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
    """Stops as soon as a number is not finite, where possible before it reaches the weights; steps count from 1."""
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


class FiniteSteps(Trainer):
    """Mixed into a trainer: checks each loss, and each gradient before it reaches the weights.

    Without it a NaN becomes the mean of the logged losses (`logging_nan_inf_filter`), and every weight becomes NaN.
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream's step, and the check of its loss."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.check_in_step("loss", loss)
        return loss

    def check_in_step(self, name: str, value: torch.Tensor | float) -> None:
        """`check_finite` after a backward pass, within which DeepSpeed has changed the weights."""
        stepped = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        check_finite(name, value, self.state.global_step + 1, reached_weights=stepped)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        # Upstream calls this once per optimizer step, before it, also where nothing is clipped.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # The scaler of fp16 looks for the scale by overflowing, and leaves those steps out by itself.
        if norm is not None and self.accelerator.scaler is None:
            self.check_in_step("gradient norm", norm)
        return norm
