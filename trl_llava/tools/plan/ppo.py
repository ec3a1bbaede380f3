"""The worst moment of each phase of a PPO step."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from trl_llava.models.base_model import base_of
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.shared_prefix import why_not
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES
from trl_llava.ppo.generation_batches import CPU_GIB, GIB, SHARE_OF_FREE, bytes_per_token, rows_at_once
from trl_llava.tools.plan.dry_passes import (
    ask_policy,
    autocast,
    encode,
    images_as,
    packed_states,
    prefill,
    response_states,
    text_inputs,
)
from trl_llava.tools.plan.job import Job, Need, Settings
from trl_llava.tools.plan.memory_model import ALONE, Moment, kv_cache, trained, without_growth
from trl_llava.tools.plan.memory_trace import MemoryTrace
from trl_llava.tools.plan.micro_batches import Shape, largest
from trl_llava.tools.plan.roles import Roles, load_roles
from trl_llava.tools.plan.stages import between_steps, dry_run, optimizer_step, prepare
from trl_llava.tools.plan.starts import judged_length

JUDGING = 512
"""Tokens that a judging turn with captions is taken to have, where nothing says how many."""


def ppo_need(job: Job, settings: Settings) -> Need:
    """What a PPO step needs, of one process.

    Args:
        job: The stage.
        settings: The settings.

    Returns:
        Moments of images, generation, the passes of all roles, the rewards, the update and the optimizer's step; the
        features of pictures on the CPU.

    Raises:
        InputError: If a model or an optimizer is of a kind that the plan does not know.
        NotFoundError: If the config of a model cannot be read.
    """
    roles = load_roles(job, settings)
    job = replace(job, processes=job.processes.for_width(roles.config("policy").get_text_config().hidden_size))
    parameters = trained([roles.policy, roles.value])
    held = roles.held(job.processes, but="reward") + roles.held(only="reward") + between_steps(parameters, job)
    phases = _Phases(job, settings, roles, held)
    accumulated = settings.rows * settings.accumulation // job.values["num_mini_batches"] > settings.rows
    peaks = {"images": phases.images(), "generation": phases.generation()}
    if job.processes.zero_stage == 3 and job.values["ds3_gather_for_generation"]:
        for peak in peaks.values():  # all of it, besides each process's share
            peak["gathered weights"] = roles.held(but="reward").total()
    peaks["passes"] = phases.passes()
    if roles.reward is not None:
        peaks["rewards"] = phases.rewards()
    peaks["update"] = phases.update(accumulated=accumulated)
    moments = [Moment(name, held + peak) for name, peak in peaks.items()]
    moments.append(optimizer_step(held, parameters, job))
    return Need(moments, phases.host, [*roles.notes, *phases.notes])


class _Phases:
    """The phases of one step, each run dry.

    The rows of a step are asked at once; `settings.rollout_rows` of them run at a time, and in the update
    `settings.rows`, or fewer where `max_tokens_per_micro_batch` is less. What tower and projector made of the pictures
    is on the CPU, but for those that a pass looks at.
    """

    def __init__(self, job: Job, settings: Settings, roles: Roles, held: Counter[str]) -> None:
        self.job, self.settings, self.roles, self.held = job, settings, roles, held
        values = job.values
        self.answer = values["response_length"]
        self.length = job.length + self.answer
        self.rows = settings.rows * settings.accumulation
        self.at_once = min(settings.rollout_rows or self.rows, self.rows)
        self.answers = values["num_generations_per_prompt"]
        models = [model for model in (roles.policy, roles.value, roles.reference) if model is not None]
        wanted = values["share_prefix"] and self.answers > 1
        self.packed = wanted and not any(why_not(model) for model in models)
        self.sampling = Sampling(values["temperature"], (), values["logits_chunk_size"])
        self.host: Counter[str] = Counter()
        self.notes: list[str] = []
        self._features: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def images(self) -> Counter[str]:
        """Tower and projector of each model but the reward, `local_rollout_forward_batch_size` rows at a time."""
        pictures = self.rows // self.answers * self.job.images
        seeing = {"policy": self.roles.policy, "value": self.roles.value, "reference": self.roles.reference}
        worst: Counter[str] = Counter()
        for role, model in seeing.items():
            if model is None or not self.job.images or _trains_eyes(model):
                continue
            config = self.roles.config(role)

            def run(trace: MemoryTrace, model: nn.Module = model, role: str = role, config: Any = config) -> None:
                found = encode(model, config, min(self.at_once * self.job.images, pictures))
                self._features[role] = (tuple(found[0].shape), found[0].dtype)

            peak = self._dry(model, run)
            shape, dtype = self._features[role]
            if role not in self.roles.sharing:
                self.host["image features of a step"] += pictures * shape[0] * shape[1] * dtype.itemsize
            worst = max(worst, peak, key=lambda parts: parts.total())
        return worst

    def generation(self) -> Counter[str]:
        """The pass over the prompts, or all keys and values of finished answers: whichever is more."""
        config, found = self.roles.config("policy"), {}
        rows = self._answered_at_once(config)
        static = self.length if self.job.values["cache_implementation"] == "static" else None
        # Several answers to a prompt go on from one pass over it.
        prompts = math.ceil(rows / self.answers) if self.packed and static is None else rows

        def run(trace: MemoryTrace) -> None:
            seen = self._seen("policy", prompts, trace)
            sizes = (prompts, self.job.length)
            found["dtype"] = prefill(self.roles.policy, *sizes, seen, bf16=self.job.autocast, static=static)

        peak = self._dry(self.roles.policy, run)
        number = found["dtype"].itemsize
        vocabulary = config.get_text_config().vocab_size
        last = Counter({"KV cache": kv_cache(config, rows, self.length, number)})
        last["logits"] = 3 * 4 * rows * vocabulary  # scores, noise, their sum
        last["image features"] = self._seen_bytes("policy", prompts)
        first = kv_cache(config, prompts, static or self.job.length, number)
        if static is not None:  # no layer is ever there twice
            first = last["KV cache"] = without_growth(config, first)
        peak["KV cache"] = min(first, peak["activations"])  # made within the pass, so counted there
        peak["activations"] -= peak["KV cache"]
        return max(last, peak, key=lambda parts: parts.total())

    def _answered_at_once(self, config: PreTrainedConfig) -> int:
        """Rows of a batch of generation, as `generation_batches` sizes it."""
        gib = self.job.values["generation_cache_gib"]
        said = f"generation_cache_gib {gib}"
        if gib is not None:
            bound = gib * GIB
        elif self.job.limit is None:
            bound, said = CPU_GIB * GIB, "generation_cache_gib on a CPU"
        else:
            bound, said = SHARE_OF_FREE * (self.job.limit - self.held.total()), "half of what is free then"
        policy: Any = self.roles.policy
        number = policy.get_input_embeddings().weight.dtype.itemsize
        row = bytes_per_token(config, number) * self.length
        rows = rows_at_once(row, bound, self.at_once)
        self.notes.append(
            f"generation answers {rows} rows at once: {row / GIB:.3g} GiB of keys and values each, at most "
            f"{self.at_once} (local_rollout_forward_batch_size) and {max(bound, 0) / GIB:.3g} GiB ({said})"
        )
        return rows

    def passes(self) -> Counter[str]:
        """What policy (reference alike) and value model say of the answers, without gradients."""
        worst: Counter[str] = Counter()
        for shape in self._shapes(self.at_once, self.packed):

            def ask(trace: MemoryTrace, shape: Shape = shape) -> None:
                with torch.no_grad(), autocast(self.job.autocast):
                    ask_policy(self.roles.policy, self._states("policy", shape, trace), self.sampling, trace)

            def value(trace: MemoryTrace, shape: Shape = shape) -> None:
                with torch.no_grad(), autocast(self.job.autocast):
                    self._values(shape, trace)

            pairs = [self._dry(self.roles.policy, ask), self._dry(self.roles.value, value)]
            worst = max(worst, *pairs, key=lambda parts: parts.total())
        return worst

    def rewards(self) -> Counter[str]:
        """The reward model over prompts, answers and judging turns, without gradients or autocast."""
        model = self.roles.reward
        length, rows = self._judged_length(), self.at_once
        if (budget := self.job.values["max_tokens_per_micro_batch"]) is not None:
            rows = min(rows, max(1, budget // length))
        assert model is not None

        def run(trace: MemoryTrace) -> None:
            seen = self._seen("reward", rows, trace)
            with torch.no_grad():
                model(**text_inputs(rows, length), **seen, use_cache=False)

        return self._dry(model, run)

    def _judged_length(self) -> int:
        """Tokens that the reward model reads: as many as it was trained on at most, if a recipe says that."""
        if self.job.judged_length is not None:
            return self.job.judged_length
        found = judged_length(self.job.values["reward_model_path"], self.job.sources)
        length, said = found or (self.length + JUDGING, f"{self.length} of prompt and answer, {JUDGING} for its turn")
        self.notes.append(f"the reward model reads {length} tokens a row ({said}): --judged_length says otherwise")
        return length

    def update(self, *, accumulated: bool) -> Counter[str]:
        """Forward passes of policy and value model over a micro-batch, then one backward pass through both."""
        policy, value = self.roles.policy, self.roles.value
        for model in (policy, value):
            prepare(model, self.settings, self.job.values["gradient_checkpointing_kwargs"])
        # A mini-batch is drawn from all rows: it may hold one answer to each prompt, or all answers to some.
        shapes = self._shapes(self.settings.rows, self.packed)
        drawn = self.job.values["num_mini_batches"] > 1 and self.rows // self.answers >= self.settings.rows
        if self.packed and drawn:
            shapes += self._shapes(self.settings.rows, False)
        worst: Counter[str] = Counter()
        for shape in shapes:

            def run(trace: MemoryTrace, shape: Shape = shape) -> None:
                with autocast(self.job.autocast):
                    states = self._states("policy", shape, trace)
                    logprobs = ask_policy(policy, states, self.sampling, trace)
                    values = self._values(shape, trace)
                (logprobs.sum() + values.sum()).backward()

            more = accumulated or shape.rows < self.settings.rows
            peak = dry_run([policy, value], run, accumulated=more, processes=self.job.processes)
            worst = max(worst, peak, key=lambda parts: parts.total())
        return worst

    def _shapes(self, most: int, packed: bool) -> list[Shape]:
        answers = min(self.answers, most) if packed else 1
        budget = self.job.values["max_tokens_per_micro_batch"]
        return largest(most, answers, self.job.length, self.answer, budget)

    def _dry(self, model: nn.Module, run: Any) -> Counter[str]:
        model.eval()
        whole = model is self.roles.reward  # DeepSpeed has nothing to do with it
        peak = dry_run([model], run, accumulated=False, processes=ALONE if whole else self.job.processes)
        del peak["gradients"]
        return peak

    def _seen(self, role: str, rows: int, trace: MemoryTrace) -> dict[str, Any]:
        """The pictures of some rows as a pass takes them: features from the CPU, or pixels."""
        images, config, features = rows * self.job.images, self.roles.config(role), None
        if not images:
            return {}
        if role in self._features:
            shape, dtype = self._features[role]
            with trace.counting_as("image features"):
                features = [torch.empty(shape, dtype=dtype) for _ in range(images)]
        return images_as(features, config, images)

    def _seen_bytes(self, role: str, rows: int) -> int:
        if role not in self._features:
            return 0
        shape, dtype = self._features[role]
        return rows * self.job.images * math.prod(shape) * dtype.itemsize

    def _states(self, role: str, shape: Shape, trace: MemoryTrace) -> torch.Tensor:
        model, answers = getattr(self.roles, role), shape.answers * self.answer
        seen = self._seen(role, shape.prompts, trace)
        if shape.answers > 1:
            return packed_states(model, shape.prompts, shape.length, answers, seen)
        return response_states(model, shape.prompts, shape.length + answers, self.answer, seen)

    def _values(self, shape: Shape, trace: MemoryTrace) -> torch.Tensor:
        states = self._states("value", shape, trace)
        model: Any = self.roles.value
        base = base_of(model)
        return base.score(states).squeeze(-1).float()


def _trains_eyes(model: nn.Module) -> bool:
    """Whether tower or projector are trained, so that nothing of what they make can be kept."""
    seeing = {*TOWER_NAMES, *PROJECTOR_NAMES}
    return any(p.requires_grad and seeing & set(name.split(".")) for name, p in model.named_parameters())
