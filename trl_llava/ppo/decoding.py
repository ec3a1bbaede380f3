"""Decoding in steps whose shapes stand still, so that a GPU records one step and replays it for the tokens to come.

A 7B model's step is some thousand small kernels. Launched one by one from Python they keep a GPU waiting for most of
the time; replayed as one CUDA graph they run at the speed of its memory. So keys and values stand in a static cache,
all that changes from token to token stands in tensors that are written in place, and nothing within a step waits for
the device: stop tokens are looked for every few tokens only.

The cache grows in buckets. Between two of them the rows that have ended leave, and the step is recorded anew.

Letters: `B` rows, `Q` padded prompt length, `R` response length, `L` length of a bucket, `V` vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trl_llava.models.adapter_role import computing
from trl_llava.models.base_model import backbone_of, base_of
from trl_llava.models.chunked_head import Sampling, logprobs_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.positions import derives_positions, prompt_positions
from trl_llava.ppo.randomness import gumbel_scores
from trl_llava.ppo.recording import record

logger = logging.getLogger(__name__)

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""What transformers calls the argument that holds keys and values; the old name is gone in 5.40."""
BUCKET = 256
"""Tokens that are drawn in a bucket of the cache."""
CHECK_EVERY = 16
"""Tokens between two looks at the stop tokens on a GPU, each of which waits for it; on a CPU a look costs nothing."""


@dataclass
class DecodingState:
    """What a step reads and writes, in place; its rows are those that have not ended when the bucket was made.

    Attributes:
        rows: (B,) their places in the batch that is generated.
        ids: (B, 1) the last token of each row, whose successor the next step draws.
        positions: (B, 1) its position, which counts real tokens, and images as the model does.
        mask: (B, L) bool, `False` at the padding of the prompts; the places to come are `True` all along, as a causal
            model does not see them.
        step: (1,) how many tokens of the response there are.
        tokens: (B, R) the response so far.
        logprobs: (B, R) float32, of each token under the distribution it was drawn from.
        ended: (B,) bool, `True` once the response holds its stop token.
        keys: (B,) int64 keys of the noise, or None, which decodes greedily.
        cache: keys and values of all tokens before the last one.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    step: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    ended: torch.Tensor
    keys: torch.Tensor | None
    cache: StaticCache

    def select(self, kept: torch.Tensor) -> "DecodingState":
        """Some rows, (b,) indices; with the same cache."""
        names = [item.name for item in fields(self) if item.name not in ("step", "cache")]
        picked: dict[str, Any] = {name: value[kept] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **picked)


class _Layer(StaticLayer):
    """Takes keys and values of another dtype than the first ones had, as autocast makes of a float32 model's."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return super().update(key_states.to(self.keys.dtype), value_states.to(self.values.dtype), *args, **kwargs)


def _empty_cache(policy: nn.Module, length: int) -> StaticCache:
    cache = StaticCache(policy.config, max_cache_len=length)
    cache.layers = [_Layer(max_cache_len=length) for _ in cache.layers]
    return cache


def why_not_static(policy: nn.Module, inputs: ModelInputs) -> str | None:
    """Why a policy cannot decode these prompts with a static cache; None if it can."""
    if is_deepspeed_zero3_enabled():
        return "under ZeRO-3 all processes call the model equally often, as transformers' `generate` does"
    if inputs.tokens and not derives_positions(policy):
        return f"{type(policy).__name__} does not attend causally everywhere"
    attention = base_of(policy).config.get_text_config()._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"{attention} does not leave out the places of a cache that are not filled yet"
    if any(type(layer) is not StaticLayer for layer in StaticCache(policy.config, max_cache_len=1).layers):
        return f"not all layers of {type(policy).__name__} keep all keys and values"
    if getattr(policy.config, "image_token_id", None) in inputs.input_ids[:, -1].tolist():
        return "a prompt ends with an image"
    return None


def why_not_recorded(policy: nn.Module) -> str | None:
    """Why a step of a policy cannot be recorded as a CUDA graph: it waits for the device; None if it may be."""
    config = base_of(policy).config
    if getattr(getattr(config, "quantization_config", None), "load_in_8bit", False):
        return "LLM.int8 looks for outliers in every step"
    rope = (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rotary embeddings of type {rope} look at the positions in every step"
    return None


class StaticDecoder:
    """Decodes batches of prompts with a policy; on a GPU, by replaying a recorded step."""

    def __init__(
        self,
        sampling: Sampling,
        response_length: int,
        stop_token_id: int | None,
        pad_token_id: int,
        share_prefix: bool,
    ) -> None:
        self.sampling = sampling
        self.response_length = response_length
        self.stop_token_id = stop_token_id
        self.pad_token_id = pad_token_id
        self.share_prefix = share_prefix
        self.replays = True  # until a step cannot be recorded, or turns out to compute something else

    def decode(
        self, policy: nn.Module, inputs: ModelInputs, keys: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Complete B prompts.

        Args:
            policy: the unwrapped policy, in eval mode.
            inputs: B prompts.
            keys: (B,) int64 keys of the noise that makes the draws; None decodes greedily.

        Returns:
            responses: (B, r) token ids, r the length of the longest; padded behind stop tokens.
            logprobs: (B, r) float32, of each token under the distribution it was drawn from; anything at padding.
        """
        state = self._prefill(policy, inputs, keys)
        tokens, logprobs, done = state.tokens.clone(), state.logprobs.clone(), 0
        while True:
            room = state.mask.shape[1] - (inputs.query_length - 1) - done
            done += self._fill_bucket(policy, state, room)
            tokens[state.rows], logprobs[state.rows] = state.tokens, state.logprobs
            running = (~state.ended).nonzero().squeeze(1)
            if done == self.response_length or len(running) == 0:
                return tokens[:, :done], logprobs[:, :done]
            state = self._next_bucket(policy, state, running, filled=inputs.query_length - 1 + done)

    def _prefill(self, policy: nn.Module, inputs: ModelInputs, keys: torch.Tensor | None) -> DecodingState:
        """Run all but the last token of each prompt, a repeated prompt once, and make the first bucket of it."""
        device, count, query = inputs.input_ids.device, len(inputs), inputs.query_length
        groups = inputs.groups if self.share_prefix else list(range(count))
        first = {group: row for row, group in reversed(list(enumerate(groups)))}
        once = sorted(first.values())
        # Not `select` alone, which would cut padding: all rows share the places of one cache.
        mask = inputs.attention_mask[once][:, :-1]
        ids = inputs.input_ids[once][:, :-1].masked_fill(mask == 0, 0)
        kinds = {name: value[once][:, :-1] for name, value in inputs.tokens.items()}
        prompts = replace(inputs.select(once), input_ids=ids, attention_mask=mask, tokens=kinds)
        prefix = DynamicCache(config=policy.config.get_text_config(decoder=True))
        positions, last = prompt_positions(policy, prompts)
        if query > 1:
            with computing(policy) as base:
                backbone_of(base)(
                    **prompts.image_kwargs(),
                    **kinds,
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    **{CACHE: prefix},
                    use_cache=True,
                )
        place = {groups[row]: index for index, row in enumerate(once)}
        copies = torch.tensor([place[group] for group in groups], device=device)
        length = query - 1 + min(self.response_length, BUCKET)
        cache = _empty_cache(policy, length)
        for layer, kept in zip(cache.layers, prefix.layers, strict=True):
            if query > 1:
                layer.update(kept.keys[copies], kept.values[copies])
                kept.keys = kept.values = None  # one layer at a time is there twice
        padding = torch.ones(count, length - query, dtype=torch.bool, device=device)
        return DecodingState(
            rows=torch.arange(count, device=device),
            ids=inputs.input_ids[:, -1:].clone(),
            positions=last[copies],
            mask=torch.cat((inputs.attention_mask.bool(), padding), 1),
            step=torch.zeros(1, dtype=torch.long, device=device),
            tokens=torch.full((count, self.response_length), self.pad_token_id, device=device),
            logprobs=torch.zeros(count, self.response_length, device=device),
            ended=torch.zeros(count, dtype=torch.bool, device=device),
            keys=keys,
            cache=cache,
        )

    def _next_bucket(
        self, policy: nn.Module, state: DecodingState, running: torch.Tensor, filled: int
    ) -> DecodingState:
        """The rows that have not ended, with a cache of which `filled` places are taken and a bucket's are free."""
        length = filled + min(BUCKET, self.response_length - int(state.step))
        cache = _empty_cache(policy, length)
        for layer, old in zip(cache.layers, state.cache.layers, strict=True):
            layer.update(old.keys[running, :, :filled], old.values[running, :, :filled])
            old.keys = old.values = None
        kept = state.select(running)
        more = torch.ones(len(running), length - kept.mask.shape[1], dtype=torch.bool, device=kept.mask.device)
        return replace(kept, mask=torch.cat((kept.mask, more), 1), cache=cache)

    def _fill_bucket(self, policy: nn.Module, state: DecodingState, room: int) -> int:
        """Draw up to `room` tokens; returns how many, fewer if all rows have ended."""
        draw = self._draw_with(policy, state)  # holds tensors that a recorded step reads: it must live as long
        step, done, on_gpu = draw, 0, _on_gpu(state)
        if on_gpu and self.replays and (reason := why_not_recorded(policy)) is not None:
            self._stop_replaying(reason)
        if on_gpu and self.replays and room > 1:
            step, done = self._record(draw, state), 1
        while done < room:
            for _ in range(min(CHECK_EVERY if on_gpu else 1, room - done)):
                step()
                done += 1
            if bool(state.ended.all()):
                break
        return done

    def _draw_with(self, policy: nn.Module, state: DecodingState) -> Callable[[], torch.Tensor]:
        """The step: draws one token for each row, all in place, and returns the logits (B, V)."""
        vocabulary = policy.get_output_embeddings().weight.shape[0]
        never = [token for token in self.sampling.suppressed if token < vocabulary]
        suppressed = torch.tensor(never, dtype=torch.long, device=state.ids.device)

        def draw() -> torch.Tensor:
            logits = policy(
                input_ids=state.ids,
                attention_mask=state.mask,
                position_ids=state.positions,
                **{CACHE: state.cache},
                use_cache=True,
            ).logits[:, -1]
            scores = logits.float().index_fill(1, suppressed, -torch.inf)
            chosen = self._choose(scores, state)
            drawn = logprobs_of(scores / (self.sampling.temperature + 1e-7), chosen)  # as `Sampling.logits` divides
            chosen = chosen.masked_fill(state.ended, self.pad_token_id)
            state.tokens.index_copy_(1, state.step, chosen.unsqueeze(1))
            state.logprobs.index_copy_(1, state.step, drawn.unsqueeze(1))
            if self.stop_token_id is not None:
                state.ended.logical_or_(chosen == self.stop_token_id)
            state.ids.copy_(chosen.unsqueeze(1))
            state.positions.add_(1)
            state.step.add_(1)
            return logits

        return draw

    def _choose(self, scores: torch.Tensor, state: DecodingState) -> torch.Tensor:
        """(B,) the next token of each row, out of logits (B, V) in which suppressed tokens are -inf."""
        if state.keys is not None:
            scores = gumbel_scores(scores, state.keys, state.step, self.sampling.temperature)
        return scores.argmax(-1)

    def _record(self, draw: Callable[[], torch.Tensor], state: DecodingState) -> Callable[[], Any]:
        """Draw one token, and record the step for the next ones if replaying it gives the same logits."""
        before = {name: getattr(state, name).clone() for name in ("ids", "positions", "step", "ended")}
        expected = draw().float()  # also loads kernels, which a recording must not
        _take_back(state, before)
        try:
            graph, logits = record(draw)
        except RuntimeError as failure:
            reason = str(failure)
        else:
            graph.replay()
            error = (logits.float() - expected).abs().max().item()
            allowed = (1e-4 if logits.dtype == torch.float32 else 0.05) * expected.abs().max().item()
            if error <= allowed:
                return graph.replay
            reason = f"its logits are {error:.3g} off, where rounding explains {allowed:.3g}"
            _take_back(state, before)
        self._stop_replaying(reason)
        draw()
        return draw

    def _stop_replaying(self, reason: str) -> None:
        self.replays = False
        logger.warning("Decoding is not replayed as a CUDA graph, and so is slower: %s.", reason)


def _on_gpu(state: DecodingState) -> bool:
    return state.ids.is_cuda


def _take_back(state: DecodingState, before: dict[str, torch.Tensor]) -> None:
    """Undo a step: the next one writes the same places of cache, tokens and log-probabilities again."""
    for name, value in before.items():
        getattr(state, name).copy_(value)
    for layer in state.cache.layers:
        layer.cumulative_length.sub_(1)
