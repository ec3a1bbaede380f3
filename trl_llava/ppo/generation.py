"""Completions to prompts: sampled with the noise of a step, or greedy.

Letters: `B` batch, `R` response length.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from torch import nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.adapter_role import computing
from trl_llava.models.base_model import base_of
from trl_llava.models.chunked_head import Sampling, logprobs_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.completions import Completions
from trl_llava.ppo.ended_rows import EnoughEnded, can_drop_rows
from trl_llava.ppo.generation_batches import GenerationBatches
from trl_llava.ppo.growing_cache import growing_cache
from trl_llava.ppo.passes import position_kwargs
from trl_llava.ppo.randomness import RowNoise, row_keys
from trl_llava.ppo.rollout import chunks, pad_right

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""What transformers calls the argument that holds keys and values; the old name is gone in 5.40."""


def suppressed_tokens(policy: nn.Module) -> list[int]:
    """Ids that no answer may hold: a sampled image token would ask for an image that is not there.

    Args:
        policy: the policy.

    Returns:
        The ids, as far as the policy has logits for them.
    """
    config = policy.config
    ids = {getattr(config, name, None) for name in ("image_token_id", "video_token_id")}
    vocabulary = config.get_text_config().vocab_size
    return sorted(token for token in ids if token is not None and token < vocabulary)


@contextmanager
def neutral_generation_config(policy: nn.Module) -> Iterator[None]:
    """Keep what a checkpoint's `generation_config.json` says out of sampling.

    transformers fills each field that a call leaves open from there. A repetition penalty or a top-p would then shape
    the answers, but not the log-probabilities that PPO computes for them.

    Args:
        policy: the policy; its own configuration is back after the block.

    Yields:
        Nothing.
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
        """Begin with nothing chosen.

        Args:
            sampling: how logits become the distribution whose log-probabilities are wanted.
        """
        self.sampling = sampling
        self.chosen: list[torch.Tensor] = []
        self.undecided: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take note of a step.

        Args:
            input_ids: (B, length so far).
            scores: (B, V) logits.

        Returns:
            The scores as they came.
        """
        self._decide(input_ids)
        self.undecided = self.sampling.logits(scores)
        return scores

    def of(self, output: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """The log-probabilities of all that was generated.

        Args:
            output: (B, Q + R) what `generate` returned.
            prompt_length: Q.

        Returns:
            (B, R) float32; whatever a row holds behind its end means nothing.
        """
        self._decide(output)
        return torch.stack(self.chosen, 1)[:, : output.shape[1] - prompt_length]

    def _decide(self, ids: torch.Tensor) -> None:
        if self.undecided is not None:
            self.chosen.append(logprobs_of(self.undecided, ids[:, -1]))
            self.undecided = None


class Generator:
    """Generates for PPO: no answer holds an image token, and a draw depends on seed, step and row alone."""

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
        """Keep what every call needs.

        Args:
            args: `response_length`, `temperature`, `seed` and `local_rollout_forward_batch_size`.
            accelerator: knows this process and its precision.
            tokenizer: its pad token fills up short answers.
            stop_token_id: ends an answer; `None` lets all answers run to `response_length`.
            sampling: how logits become the distribution that is drawn from, and ids that no answer may hold.
            keep_logprobs: whether drawn answers come with the log-probabilities that they were drawn with.
        """
        self.args = args
        self.accelerator = accelerator
        self.pad_token_id = tokenizer.pad_token_id
        self.stop_token_id = stop_token_id
        self.sampling = sampling
        self.keep_logprobs = keep_logprobs
        self.batches = GenerationBatches(args, accelerator)
        self.config = GenerationConfig(
            max_new_tokens=args.response_length,
            do_sample=False,  # `RowNoise` makes the argmax a draw
            eos_token_id=stop_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=list(sampling.suppressed) or None,
            # A dynamic one is made here, and transformers takes a cache or the name of one.
            cache_implementation=None if args.cache_implementation == "dynamic" else args.cache_implementation,
        )

    def generate(self, policy: nn.Module, inputs: ModelInputs, step: int | None) -> Completions:
        """Answer B prompts.

        Args:
            policy: the unwrapped policy, in eval mode.
            inputs: the prompts of this process.
            step: the PPO step whose noise makes the draws; `None` answers greedily.

        Returns:
            The answers.
        """
        keys = None
        if step is not None:
            first = self.accelerator.process_index * len(inputs)
            places = torch.arange(first, first + len(inputs), device=inputs.input_ids.device)
            keys = row_keys(self.args.seed, step, places)
        responses: list[torch.Tensor] = []
        logprobs: list[torch.Tensor] = []
        with neutral_generation_config(policy), self._as_it_is(), self.accelerator.autocast():
            for rows in chunks(len(inputs), self.batches.rows(policy, max(inputs.lengths))):
                tokens, known = self._generate(policy, inputs.select(rows), None if keys is None else keys[rows])
                responses.append(tokens)
                logprobs += [] if known is None else [known]
        whole = pad_right(logprobs, 0) if logprobs else None
        return Completions.from_tokens(pad_right(responses, self.pad_token_id), self.stop_token_id, whole)

    def _as_it_is(self) -> AbstractContextManager[None]:
        """Keep compiled layers out of generation, where every step and layer would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()

    def _generate(
        self, policy: nn.Module, inputs: ModelInputs, keys: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, R) token ids, and the log-probabilities that they were drawn with, if they are kept."""
        query, most = inputs.query_length, self.args.response_length
        leaves_at: int | None = None  # the token behind which a row may leave
        ids, attention_mask = inputs.input_ids.masked_fill(inputs.attention_mask == 0, 0), inputs.attention_mask
        pictures = inputs.image_kwargs()
        cache: dict[str, Cache] = {}
        if self.config.cache_implementation is None:
            cache[CACHE] = growing_cache(policy, query + most)
            leaves_at = self.stop_token_id if can_drop_rows(policy, inputs) else None
            if self.args.share_prefix and can_prefill_once(policy, inputs):
                run_prompts_once(policy, inputs, cache[CACHE])
                pictures = {}
        tokens = ids.new_full((len(ids), most), self.pad_token_id)
        known = torch.zeros(len(ids), most, device=ids.device) if self.keep_logprobs and keys is not None else None
        rows = torch.arange(len(ids), device=ids.device)
        while True:
            start = ids.shape[1] - query
            stop_early = [] if leaves_at is None else [EnoughEnded(ids.shape[1], leaves_at)]
            given = {"attention_mask": attention_mask, "stopping_criteria": StoppingCriteriaList(stop_early)}
            output, logprobs = self._call(policy, ids, query, keys, **given, **pictures, **cache)
            end = output.shape[1] - query
            new = output[:, query + start :]
            tokens[rows, start:end] = new
            if known is not None and logprobs is not None:
                known[rows, start:end] = logprobs
            if leaves_at is None or end == most or (new == leaves_at).any(1).all():
                return tokens[:, :end], None if known is None else known[:, :end]
            left = (new != leaves_at).all(1).nonzero().squeeze(1)
            cache[CACHE].batch_select_indices(left)
            rows, ids, keys, pictures = rows[left], output[left], None if keys is None else keys[left], {}
            attention_mask = nn.functional.pad(attention_mask[left], (0, end - start), value=1)

    def _call(
        self, policy: nn.Module, ids: torch.Tensor, query: int, keys: torch.Tensor | None, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call `generate`: ids (B, L) with those that it adds, and the log-probabilities of these."""
        config = copy.deepcopy(self.config)
        config.max_new_tokens = query + self.args.response_length - ids.shape[1]
        # Ahead of the noise, which is no part of the distribution.
        chosen = ChosenLogprobs(self.sampling) if self.keep_logprobs and keys is not None else None
        noise = None if keys is None else RowNoise(keys, query, self.args.temperature)
        output = policy.generate(
            input_ids=ids,
            **given,
            generation_config=config,
            logits_processor=LogitsProcessorList([step for step in (chosen, noise) if step is not None]),
        )
        return output, None if chosen is None else chosen.of(output, ids.shape[1])


def can_prefill_once(policy: nn.Module, inputs: ModelInputs) -> bool:
    """Whether prompts repeat, and a model can go on from what it kept of each.

    Args:
        policy: the policy.
        inputs: prompts.

    Returns:
        `False` also if a prompt ends with an image token, or for a model that derives its own positions.
    """
    if not inputs.can_be_packed or not position_kwargs(policy, inputs.attention_mask):
        return False
    return getattr(policy.config, "image_token_id", None) not in inputs.input_ids[:, -1].tolist()


def run_prompts_once(policy: nn.Module, inputs: ModelInputs, cache: Cache) -> None:
    """Fill a cache with what the policy keeps of prompts, all but their last token, each run once and copied.

    Args:
        policy: the unwrapped policy.
        inputs: B prompts of which some are the same.
        cache: an empty one; afterwards it has B rows and Q - 1 tokens.
    """
    first = {group: row for row, group in reversed(list(enumerate(inputs.groups)))}
    once = sorted(first.values())
    # Not `select`, which would cut padding: the cache has to be as wide as all prompts are.
    attention_mask = inputs.attention_mask[once][:, :-1]
    with computing(policy) as base:
        getattr(base, base.base_model_prefix)(
            **inputs.select(once).image_kwargs(),
            input_ids=inputs.input_ids[once][:, :-1].masked_fill(attention_mask == 0, 0),
            attention_mask=attention_mask,
            **position_kwargs(base, attention_mask),
            **{CACHE: cache},
            use_cache=True,
        )
    place = {inputs.groups[row]: index for index, row in enumerate(once)}
    rows = torch.tensor([place[group] for group in inputs.groups], device=inputs.input_ids.device)
    cache.batch_select_indices(rows)
