"""A loss or gradient that is not finite stops SFT and reward training; transformers filters it out of the log."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from trl_llava.ppo.health import check_finite


class FiniteSteps(Trainer):
    """Mixed into a trainer: checks each loss, and each gradient before it reaches the weights.

    Without it a NaN becomes the mean of the logged losses (`logging_nan_inf_filter`), and every weight becomes NaN.
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream's step, and the check of its loss.

        Args:
            model: the model.
            inputs: a batch.
            *args: passed on.
            **kwargs: passed on.

        Returns:
            The loss.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_finite("loss", loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        # Upstream asks once per optimizer step, before it, also where nothing is clipped.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # The scaler of fp16 looks for the scale by overflowing, and leaves those steps out by itself.
        if norm is not None and self.accelerator.scaler is None:
            check_finite("gradient norm", norm, self.state.global_step + 1)
        return norm
