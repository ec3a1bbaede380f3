"""The update: policy and value take one optimizer step per mini-batch of a rollout."""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.health import check_finite, check_first_step_ratio
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.micro_batches import Lengths, micro_batches
from trl_llava.ppo import ppo_math
from trl_llava.ppo.randomness import mini_batch_order
from trl_llava.ppo.rollout import Rollout


@dataclass
class Updater:
    """Trains policy and value model on a rollout, `num_ppo_epochs` times over it.

    A mini-batch is one optimizer step. Its loss is the mean over its real tokens on all processes, so it does not
    depend on how the mini-batch is split into micro-batches; TRL takes means of means, and steps once per epoch
    whatever `num_mini_batches` says.

    Attributes:
        args: the config.
        accelerator: the one that prepared model and optimizer.
        model: a prepared `PolicyAndValue`.
        optimizer: the prepared optimizer.
        sampling: how the policy's logits become the distribution that tokens were drawn from.
        share_prefix: whether completions of the same prompt run as one row.
    """

    args: LlavaPPOConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampling: Sampling
    share_prefix: bool = False

    def train_on(self, rollout: Rollout, step: int, nothing_moved_yet: bool) -> dict[str, float]:
        """Train on B completions with advantages and returns.

        Args:
            rollout: the rollout.
            step: the PPO step, counted from 1, for error messages.
            nothing_moved_yet: `True` at the first step, whose first ratios must be 1.

        Returns:
            Metrics by TRL's names: means over all tokens of all processes and passes; `grad_norm` over the steps.

        Raises:
            UnhealthyRunError: if a ratio is not 1 before the first update, or loss or gradient are not finite.
        """
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
        self.grad_norms: list[torch.Tensor] = []
        self.check_ratio = self.args.check_first_step and nothing_moved_yet
        lengths = rollout.lengths(self.share_prefix)
        for epoch in range(self.args.num_ppo_epochs):
            parts, process = self.args.num_mini_batches, self.accelerator.process_index
            order = mini_batch_order(len(rollout), parts, self.args.seed, process, step, epoch)
            for rows in np.split(order, parts):
                self._mini_batch(rollout, rows.tolist(), lengths, step)
        return self._metrics()

    def _mini_batch(self, rollout: Rollout, rows: list[int], lengths: Lengths, step: int) -> None:
        """One optimizer step, accumulated over micro-batches so that each real token weighs the same."""
        accelerator = self.accelerator
        tokens = accelerator.reduce(rollout.mask[rows].sum(), reduction="sum")
        # DDP and DeepSpeed average over processes and `backward` divides by the accumulation steps: undo both, since
        # the loss is already a share of the mean over all tokens of all processes.
        undo_averaging = accelerator.num_processes * accelerator.gradient_accumulation_steps
        limits = (self.args.per_device_train_batch_size, self.args.max_tokens_per_micro_batch)
        parts = micro_batches(rows, lengths, *limits, accelerator)
        for part in parts:
            # Not `accelerator.accumulate`: it also synchronises whenever the data loader reaches its end.
            accelerator.sync_gradients = part is parts[-1]
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(self.model):
                loss = self._loss(rollout.select(part), tokens)
                check_finite("the loss", loss.detach(), step)
                accelerator.backward(loss * undo_averaging)
        max_norm = self.args.max_grad_norm or math.inf  # the norm is wanted even where nothing is clipped
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        if grad_norm is not None:
            grad_norm = torch.as_tensor(grad_norm, device=accelerator.device).detach().float()
            # DeepSpeed has taken its step within `backward`.
            stepped = accelerator.distributed_type == DistributedType.DEEPSPEED
            check_finite("the gradient norm", grad_norm, step, reached_weights=stepped)
            self.grad_norms.append(grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, part: Rollout, tokens: torch.Tensor) -> torch.Tensor:
        """The share of a micro-batch in the mini-batch's loss, which is a mean over `tokens` tokens."""
        args, mask = self.args, part.mask
        logprobs, entropies, values = self.model(part, self.sampling, self.share_prefix)
        policy = ppo_math.policy_loss(logprobs, part.logprobs, part.advantages, mask, args.cliprange)
        policy_losses = policy.losses * part.importance if part.importance.numel() else policy.losses
        value = ppo_math.value_loss(values, part.values, part.returns, mask, args.cliprange_value)
        with torch.no_grad():
            if self.check_ratio:
                check_first_step_ratio(policy.ratio, mask, self._ratio_tolerance())
                self.check_ratio = False
            for name, per_token in {
                "policy/approxkl_avg": 0.5 * policy.log_ratio**2,
                "policy/clipfrac_avg": policy.clipped.float(),
                "policy/entropy_avg": entropies,
                "loss/policy_avg": policy_losses,
                "loss/value_avg": value.losses,
                "val/clipfrac_avg": value.clipped.float(),
                "val/ratio": policy.ratio,
                "val/token_ratio_var": policy.ratio**2,
                "tokens": torch.ones_like(policy.ratio),
            }.items():
                self.sums[name] += ppo_math.masked_sum(per_token, mask)
        return (policy_losses.sum() + args.vf_coef * value.losses.sum()) / tokens

    def _ratio_tolerance(self) -> float:
        if self.args.first_step_ratio_tolerance is not None:
            return self.args.first_step_ratio_tolerance
        model = self.accelerator.unwrap_model(self.model)
        in_16_bit = self.accelerator.mixed_precision != "no" or model.policy.dtype != torch.float32
        return 5e-2 if in_16_bit else 1e-3

    def _metrics(self) -> dict[str, float]:
        names = list(self.sums)
        totals = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum")
        totals = dict(zip(names, totals.tolist(), strict=True))
        tokens = totals.pop("tokens")
        metrics = {name: total / tokens for name, total in totals.items()}
        # TRL's `val/ratio_var` is another number: the variance of the means of micro-batches.
        metrics["val/token_ratio_var"] -= metrics["val/ratio"] ** 2
        if self.grad_norms:
            metrics["grad_norm"] = torch.stack(self.grad_norms).mean().item()
        return metrics
