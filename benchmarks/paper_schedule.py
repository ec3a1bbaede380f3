"""The schedule of the paper's own code, in our trainer: what our passes save is what this one spends.

Image features are computed anew in every pass; completions are padded to `response_length`; the language-model head
runs at all positions; policy and value model have a backward pass each.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from trl.trainer.utils import selective_log_softmax

from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo import ppo_math
from trl_llava.ppo.rollout import Rollout, chunks
from trl_llava.ppo_trainer import LlavaPPOTrainer


class PaperSchedule(LlavaPPOTrainer):
    """`LlavaPPOTrainer` without what makes its passes lean; with the same numbers."""

    def rollout(self, batch: dict[str, Any], step: int) -> Rollout:
        """Answer a batch of prompts, every model with all its work.

        Args:
            batch: what the collator returns, B rows.
            step: the PPO step.

        Returns:
            The rollout, not yet scored, `response_length` wide.
        """
        inputs = ModelInputs.from_batch(batch, self.accelerator.device)
        with torch.no_grad():
            with self.gathered() as model, self.clock.phase("generation"):
                responses, mask, stopped, _ = self.generator.generate(model.policy, inputs, step)
            missing = self.args.response_length - responses.shape[1]
            responses = nn.functional.pad(responses, (0, missing), value=self.tokenizer.pad_token_id)
            mask = nn.functional.pad(mask, (0, missing), value=False)
            model = self.accelerator.unwrap_model(self.model)
            logprobs, ref_logprobs, values = [], [], []
            with self.clock.phase("forward"):
                for rows in chunks(len(inputs), self.args.local_rollout_forward_batch_size):
                    answers = (inputs.select(rows), responses[rows], mask[rows])
                    logprobs.append(self._all_logprobs(model.policy, *answers))
                    with self.roles.reference(model.policy) as reference:
                        ref_logprobs.append(self._all_logprobs(reference, *answers))
                    values.append(self._all_values(model.value_model, *answers))
        return Rollout(
            inputs=inputs,
            value_inputs=inputs,
            columns=batch["columns"],
            responses=responses,
            mask=mask,
            stopped=stopped,
            logprobs=torch.cat(logprobs),
            ref_logprobs=torch.cat(ref_logprobs),
            values=torch.cat(values),
        )

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Train the policy, then the value model, on each micro-batch.

        Args:
            rollout: B answers with advantages.
            step: the PPO step.

        Returns:
            No metrics.
        """
        self.model.train()
        with self.clock.phase("update"):
            for epoch in range(self.args.num_ppo_epochs):
                order = np.random.default_rng([self.args.seed, step, epoch]).permutation(len(rollout))
                for rows in np.split(order, self.args.num_mini_batches):
                    self._mini_batch(rollout, rows)
        return {}

    def _mini_batch(self, rollout: Rollout, rows: np.ndarray) -> None:
        model, args = self.accelerator.unwrap_model(self.model), self.args
        tokens = rollout.mask[rows].sum()
        for part in chunks(len(rows), args.per_device_train_batch_size):
            at = rows[part].tolist()
            mask = rollout.mask[at]
            answers = (rollout.inputs.select(at), rollout.responses[at], mask)
            logprobs = self._all_logprobs(model.policy, *answers)
            old, advantages = rollout.logprobs[at], rollout.advantages[at]
            policy = ppo_math.policy_loss(logprobs, old, advantages, mask, args.cliprange)
            (policy.losses.sum() / tokens).backward()
            values = self._all_values(model.value_model, *answers)
            value = ppo_math.value_loss(values, rollout.values[at], rollout.returns[at], mask, args.cliprange_value)
            (args.vf_coef * value.losses.sum() / tokens).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _all_logprobs(
        self, policy: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """(B, R) log-probabilities, from logits of all positions."""
        logits = policy(**_pixels(inputs, responses, mask)).logits / (self.args.temperature + 1e-7)
        logits = logits[:, inputs.query_length - 1 : -1].float()
        logprobs = selective_log_softmax(logits, responses.masked_fill(~mask, 0))
        return torch.where(mask, logprobs, torch.zeros_like(logprobs))

    def _all_values(
        self, value_model: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """(B, R) values."""
        model = value_model.get_base_model()
        hidden = model.model(**_pixels(inputs, responses, mask)).last_hidden_state
        values = model.score(hidden)[:, inputs.query_length - 1 : -1].squeeze(-1).float()
        return torch.where(mask, values, torch.zeros_like(values))


def _pixels(inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a pass over prompts and answers, with pictures as pixels."""
    attention_mask = torch.cat((inputs.attention_mask, mask.long()), 1)
    return {
        "input_ids": torch.cat((inputs.input_ids, responses), 1).masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "position_ids": attention_mask.cumsum(1) - attention_mask,
        "pixel_values": inputs.image_tensors()["pixel_values"],
        "use_cache": False,
    }
