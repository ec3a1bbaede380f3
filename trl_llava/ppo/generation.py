"""Completions of prompts by the policy: sampled with the noise of a step, or greedy.

Letters: `B` batch, `R` response length.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.base_model import base_of
from trl_llava.models.chunked_head import Sampling, logprobs_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.completions import Completions
from trl_llava.ppo.decoding import StaticDecoder, why_not_static
from trl_llava.ppo.generation_batches import GenerationBatches
from trl_llava.ppo.randomness import RowNoise, row_keys
from trl_llava.ppo.rollout import chunks, pad_right

logger = logging.getLogger(__name__)


def suppressed_tokens(policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Ids that no completion may hold: a sampled image token would need an image that is not there.

    Of `tokenizer`, those that it has no token for too: vocabularies are padded, and not every model that reads a
    completion has an embedding there.
    """
    config = policy.config
    ids = {getattr(config, name, None) for name in ("image_token_id", "video_token_id")}
    vocabulary = range(config.get_text_config().vocab_size)
    ids |= set() if tokenizer is None else {*vocabulary} - {*tokenizer.get_vocab().values()}
    return sorted(token for token in ids if token is not None and token in vocabulary)


@contextmanager
def neutral_generation_config(policy: nn.Module) -> Iterator[None]:
    """Keep what a checkpoint's `generation_config.json` says out of sampling.

    transformers fills each field that a call leaves open from there. A repetition penalty or a top-p would then shape
    the completions, but not the log-probabilities that PPO computes for them.
    """
    model = base_of(policy)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class ChosenLogprobs(LogitsProcessor):
    """Keeps the log-probability of every token that `generate` chooses: one number a row, and no step's scores.

    Which token a step chose shows in the ids of the next one, so what stands behind this in the list of processors may
    choose as it likes.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.chosen: list[torch.Tensor] = []
        self.undecided: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take note of a step's (B, V) logits, and return them as they came."""
        self._decide(input_ids)
        self.undecided = self.sampling.logits(scores)
        return scores

    def of(self, output: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """(B, R) float32 of the R tokens in `output` (B, Q + R); anything behind a row's end."""
        self._decide(output)
        return torch.stack(self.chosen, 1)[:, : output.shape[1] - prompt_length]

    def _decide(self, ids: torch.Tensor) -> None:
        if self.undecided is not None:
            self.chosen.append(logprobs_of(self.undecided, ids[:, -1]))
            self.undecided = None


class Generator:
    """Generates for PPO: no completion holds an image token, and a draw depends on seed, step and row alone.

    Args:
        args: `response_length`, `temperature`, `seed`, `cache_implementation`, `local_rollout_forward_batch_size`.
        accelerator: knows this process and its precision.
        tokenizer: its pad token fills up short completions.
        stop_token_id: ends a completion; `None` lets all run to `response_length`.
        sampling: how logits become the distribution that is drawn from, and ids that are never drawn.
        keep_logprobs: whether drawn completions come with the log-probabilities that they were drawn with.
    """

    def __init__(
        self,
        args: LlavaPPOConfig,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_id: int | None,
        sampling: Sampling,
        *,
        keep_logprobs: bool = False,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.pad_token_id = tokenizer.pad_token_id
        self.stop_token_id = stop_token_id
        self.sampling = sampling
        self.keep_logprobs = keep_logprobs
        self.batches = GenerationBatches(args, accelerator)
        self.decoder = StaticDecoder(
            sampling, args.response_length, stop_token_id, tokenizer.pad_token_id, args.share_prefix
        )
        self.said_why = False

    def generate(self, policy: nn.Module, inputs: ModelInputs, step: int | None) -> Completions:
        """Complete B prompts.

        Args:
            policy: the unwrapped policy, in eval mode.
            inputs: the prompts of this process.
            step: the PPO step whose noise makes the draws; `None` generates greedily.

        Returns:
            The completions.
        """
        keys = None
        if step is not None:
            first = self.accelerator.process_index * len(inputs)
            places = torch.arange(first, first + len(inputs), device=inputs.input_ids.device)
            keys = row_keys(self.args.seed, step, places)
        static = self._decodes_statically(policy, inputs)
        # A recorded step must not use weights that autocast has cast before, and will forget.
        autocast = self.accelerator.autocast(AutocastKwargs(cache_enabled=not static))
        responses: list[torch.Tensor] = []
        logprobs: list[torch.Tensor] = []
        with torch.no_grad(), self._without_compiled_layers(), autocast:
            for rows in chunks(len(inputs), self.batches.rows(policy, max(inputs.lengths))):
                part, part_keys = inputs.select(rows), None if keys is None else keys[rows]
                decode = self.decoder.decode if static else self._generate_plainly
                tokens, known = decode(policy, part, part_keys)
                responses.append(tokens)
                logprobs.append(known)
        kept = pad_right(logprobs, 0) if self.keep_logprobs and keys is not None else None
        return Completions.from_tokens(pad_right(responses, self.pad_token_id), self.stop_token_id, kept)

    def _decodes_statically(self, policy: nn.Module, inputs: ModelInputs) -> bool:
        if self.args.cache_implementation == "dynamic":
            return False
        reason = why_not_static(policy, inputs)
        if reason is not None and not self.said_why:
            self.said_why = True
            logger.warning("Generation runs transformers' own loop, which is slower on a GPU: %s.", reason)
        return reason is None

    def _without_compiled_layers(self) -> AbstractContextManager[None]:
        """Layers that `torch_compile` has compiled run eagerly here: each step would compile them anew."""
        return torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()

    def _generate_plainly(
        self, policy: nn.Module, inputs: ModelInputs, keys: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, R) token ids and their log-probabilities, by transformers' `generate` with its own cache."""
        query = inputs.query_length
        chosen = ChosenLogprobs(self.sampling)  # ahead of the noise, which is no part of the distribution
        noise = [] if keys is None else [RowNoise(keys, query, self.args.temperature)]
        config = GenerationConfig(
            max_new_tokens=self.args.response_length,
            do_sample=False,  # `RowNoise` makes the argmax a draw
            eos_token_id=self.stop_token_id,
            pad_token_id=self.pad_token_id,
            suppress_tokens=list(self.sampling.suppressed) or None,
        )
        with neutral_generation_config(policy):
            output = policy.generate(
                **inputs.prompt_kwargs(),
                generation_config=config,
                logits_processor=LogitsProcessorList([chosen, *noise]),
            )
        return output[:, query:], chosen.of(output, query)
