"""Log-probabilities of policy and reference, and values, of every token of a rollout: constants of the update.

Letters: `B` batch, `R` response length.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.adapter_switching import active_adapter
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.micro_batches import micro_batches
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.shared_prefix import why_not
from trl_llava.ppo.completions import Completions
from trl_llava.ppo.passes import PolicyAndValue, response_logprobs, response_values
from trl_llava.ppo.rollout import lengths_of

logger = logging.getLogger(__name__)


@dataclass
class RolePasses:
    """The passes of policy, reference and value model over a rollout, without gradients.

    Attributes:
        args: the sizes of micro-batches, and `ref_adapter_name`.
        accelerator: the one that prepared the model.
        model: a prepared `PolicyAndValue`.
        ref_model: a reference of its own; `None` if it is the policy's base with another adapter, or none.
        sampling: how logits become the distribution that tokens were drawn from.
        share_prefix: whether completions of the same prompt run as one row.
    """

    args: LlavaPPOConfig
    accelerator: Accelerator
    model: nn.Module
    ref_model: PreTrainedModel | None
    sampling: Sampling
    share_prefix: bool = False

    def logprobs_and_values(
        self, inputs: ModelInputs, ref_inputs: ModelInputs, value_inputs: ModelInputs, completions: Completions
    ) -> torch.Tensor:
        """(3, B, R) log-probabilities of policy and reference, and values; 0 at padding.

        Each role sees the B prompts as its own processor encodes them. The policy's log-probabilities are those of
        `completions` where it has them.
        """
        responses, mask, _, known = completions
        model: PolicyAndValue = self.accelerator.unwrap_model(self.model)
        lengths = lengths_of(inputs, value_inputs, mask, self.share_prefix)
        limits = (self.args.local_rollout_forward_batch_size, self.args.max_tokens_per_micro_batch)
        # Made outside of inference mode: the update's graph may hold them.
        found = torch.zeros(3, *mask.shape, device=mask.device)
        if known is not None:
            found[0] = known
        # ZeRO-3 gathers weights into tensors that it uses again in the update.
        no_graph = torch.no_grad if is_deepspeed_zero3_enabled() else torch.inference_mode
        with no_graph(), self.accelerator.autocast():
            for rows in micro_batches(range(len(inputs)), lengths, *limits, self.accelerator):
                width = max(lengths.responses[row] for row in rows)
                part = (responses[rows, :width], mask[rows, :width])
                if known is None:
                    found[0, rows, :width] = self._logprobs(model.policy, inputs.select(rows), *part)
                with self.reference(model.policy) as reference:
                    found[1, rows, :width] = self._logprobs(reference, ref_inputs.select(rows), *part)
                found[2, rows, :width] = response_values(
                    model.value_model, value_inputs.select(rows), *part, share_prefix=self.share_prefix
                )
        return found

    def _logprobs(
        self, policy: nn.Module, inputs: ModelInputs, responses: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return response_logprobs(policy, inputs, responses, mask, self.sampling, share_prefix=self.share_prefix)[0]

    @contextmanager
    def reference(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference: a model of its own, or the unwrapped policy's base with the adapter it started from."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with active_adapter(policy, self.args.ref_adapter_name):
                yield policy


def can_share_prefix(args: LlavaPPOConfig, roles: list[nn.Module]) -> bool:
    """Whether several completions of a prompt run as one row, in every role alike; logs why not."""
    if args.num_generations_per_prompt == 1 or not args.share_prefix:
        return False
    reasons = [reason for role in roles if (reason := why_not(role)) is not None]
    if reasons:
        logger.warning(
            "A prompt runs once for each of its completions, not once for all of them: %s.", "; ".join(reasons)
        )
    return not reasons
