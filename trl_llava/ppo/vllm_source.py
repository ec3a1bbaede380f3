"""Completions to prompts from vLLM, in place of `Generator`: the same prompts go in, the same `Completions` come out.

vLLM's log-probabilities are only compared: those that PPO trains on are computed by the policy itself. Each prompt's
seed depends on the run's seed, step and row alone; what vLLM draws with it is its own affair, and changes in the last
digits with what else it computes at that moment.

Letters: `B` batch, `R` response length.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.data.contract import abridged
from trl_llava.health import UnhealthyRunError
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo import ppo_math
from trl_llava.ppo.completions import Completions
from trl_llava.ppo.randomness import row_keys
from trl_llava.ppo.vllm_engine import EngineCompletion, Request, VLLMEngine
from trl_llava.ppo.vllm_prompts import as_seen
from trl_llava.ppo.vllm_server import RolloutEngineError

NEVER = -100.0
"""The lowest logit bias that vLLM knows: e^-100 of the probability is left."""


class VLLMGenerator:
    """Has vLLM complete prompts, with the policy's current weights."""

    def __init__(
        self,
        args: LlavaPPOConfig,
        accelerator: Accelerator,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        policy: nn.Module,
        stop_token_id: int | None,
        suppressed: list[int],
        updates: Callable[[], int],
    ) -> None:
        """Connect to vLLM.

        Args:
            args: `vllm_*`, `response_length`, `temperature` and `seed`.
            accelerator: knows the processes.
            processing_class: the policy's processor, or its tokenizer.
            policy: the unwrapped policy.
            stop_token_id: ends a completion; `None` lets all completions run to `response_length`.
            suppressed: ids that no completion may hold.
            updates: how many updates the policy has had.

        Raises:
            MissingPackageError: if there is no vLLM.
            RolloutEngineError: if the server cannot be reached, or serves another model.
        """
        self.args = args
        self.accelerator = accelerator
        self.processor = processing_class
        self.pad_token_id = getattr(processing_class, "tokenizer", processing_class).pad_token_id
        self.vocabulary = policy.config.get_text_config().vocab_size
        self.stop_token_id = stop_token_id
        self.suppressed = suppressed
        self.updates = updates
        self.sent_at: int | None = None
        self.engine = VLLMEngine(args, policy, accelerator, processing_class)
        self.logprobs = torch.empty(0)
        self.differences: dict[str, float] = {}

    def generate(self, inputs: ModelInputs, images: Sequence[Sequence[Image.Image]], step: int | None) -> Completions:
        """Complete B prompts; on every process.

        Args:
            inputs: the prompts of this process, the copies of a prompt beside each other.
            images: the images of each of the B prompts.
            step: the PPO step that the seeds depend on; `None` generates greedily.

        Returns:
            The completions, whose log-probabilities are still to be computed.

        Raises:
            RolloutEngineError: if vLLM fails, or its completions cannot be used.
        """
        if self.sent_at != self.updates():
            self.engine.send_weights()
            self.sent_at = self.updates()
        requests = self._requests(inputs, images, step)
        completions = []
        for request, given in zip(requests, self.engine.generate(requests), strict=True):
            if len(given) != request.settings["n"]:
                raise RolloutEngineError(
                    f"vLLM gave {len(given)} completions of a prompt instead of {request.settings['n']}"
                )
            completions += given
        for completion in completions:
            self._check(completion)
        device, width = inputs.input_ids.device, max(len(completion.token_ids) for completion in completions)
        responses = torch.full((len(completions), width), self.pad_token_id)
        self.logprobs = torch.zeros(len(completions), width)
        for row, completion in enumerate(completions):
            responses[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids)
            self.logprobs[row, : len(completion.token_ids)] = torch.tensor(completion.logprobs)
        self.logprobs = self.logprobs.to(device)
        return Completions.from_tokens(responses.to(device), self.stop_token_id)

    def compare(self, logprobs: torch.Tensor, mask: torch.Tensor, step: int) -> None:
        """Hold the log-probabilities of vLLM's last completions against the policy's; fills `differences`.

        Args:
            logprobs: (B, R) as the policy computes them.
            mask: (B, R) bool, `True` at real tokens.
            step: the PPO step, for the message.

        Raises:
            UnhealthyRunError: if they differ by more than `vllm_logprob_tolerance` on average over all processes.
        """
        apart = (self.logprobs - logprobs).abs()[mask]
        apart = apart[~apart.isnan()]
        own = torch.tensor([[apart.sum().item(), len(apart), apart.max().item() if len(apart) else 0.0]])
        total, count, largest = self.accelerator.gather(own.to(logprobs.device)).unbind(1)
        mean = total.sum().item() / count.sum().item() if count.sum() else math.nan
        # TRL's names
        self.differences = {
            "sampling/sampling_logp_difference/mean": mean,
            "sampling/sampling_logp_difference/max": largest.max().item(),
        }
        tolerance = self.args.vllm_logprob_tolerance
        if tolerance is not None and not mean <= tolerance:
            raise UnhealthyRunError(
                f"at step {step} vLLM's log-probabilities are {mean:.3g} nats per token off from the policy's, "
                f"expected at most {tolerance:g} (vllm_logprob_tolerance): it computes with other weights, or "
                "sees other images. Usual causes: a server without `--logprobs-mode processed_logprobs`, "
                "or started from a folder with another image processor, or another dtype"
            )

    def importance_weights(self, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Weights (B, R) of the policy's losses on the last completions; empty without a correction.

        `logprobs` (B, R) are the policy's, `mask` (B, R) is `True` at real tokens.
        """
        args = self.args
        if not args.vllm_importance_sampling_correction:
            return torch.empty(0)
        limits = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        weights = ppo_math.importance_weights(
            logprobs, self.logprobs, mask, args.vllm_importance_sampling_mode, *limits
        )
        mean = self.accelerator.gather(weights[mask].mean().reshape(1)).mean().item()
        self.differences["sampling/importance_sampling_ratio/mean"] = mean
        return weights

    def _requests(
        self, inputs: ModelInputs, images: Sequence[Sequence[Image.Image]], step: int | None
    ) -> list[Request]:
        """One for each prompt, however often it is completed."""
        first = self.accelerator.process_index * len(inputs)
        keys = row_keys(self.args.seed, step or 0, torch.arange(first, first + len(inputs))).tolist()
        requests = []
        for _, copies in groupby(range(len(inputs)), key=lambda row: inputs.groups[row]):
            rows = list(copies)
            row = rows[0]
            settings = {
                "n": len(rows),
                "temperature": 0.0 if step is None else self.args.temperature,
                "max_tokens": self.args.response_length,
                # The model's own stop tokens would end completions where PPO goes on.
                "ignore_eos": True,
                "stop_token_ids": [] if self.stop_token_id is None else [self.stop_token_id],
                "logit_bias": dict.fromkeys(self.suppressed, NEVER) or None,
                # vLLM counts up from here for the copies of a prompt.
                "seed": None if step is None else keys[row] % 2**48,
                "detokenize": False,
            }
            token_ids = inputs.input_ids[row][inputs.attention_mask[row].bool()].tolist()
            shown = [as_seen(image, self.processor) for image in images[row]]
            requests.append(Request(token_ids, shown, settings))
        return requests

    def _check(self, completion: EngineCompletion) -> None:
        """Stop at a completion that this run could not have drawn."""
        ids, limit = completion.token_ids, self.args.response_length
        wrong = next((t for t in ids if not 0 <= t < self.vocabulary or t in self.suppressed), None)
        if wrong is not None:
            raise RolloutEngineError(
                f"vLLM's completion holds the token id {wrong}, which is no id that the policy may draw (0 to "
                f"{self.vocabulary - 1}, without {abridged(self.suppressed)}): does it serve the policy's model?"
            )
        if len(ids) > limit or (len(ids) < limit and ids[-1:] != [self.stop_token_id]):
            raise RolloutEngineError(
                f"vLLM's completion ends after {len(ids)} tokens, without the stop token {self.stop_token_id} or at "
                f"another length than `response_length` ({limit}): was it aborted, or `--max-model-len` reached?"
            )
