"""The worst moment of each phase of a PPO step."""

from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from trl_llava.chunked_head import Sampling
from trl_llava.dry_passes import (
    ask_policy,
    autocast,
    encode,
    image_inputs,
    images_as,
    prefill,
    response_states,
    text_inputs,
)
from trl_llava.memory_model import Moment, kv_cache, optimizer_states, share, trained
from trl_llava.memory_trace import MemoryTrace
from trl_llava.plan_roles import Roles, load_roles
from trl_llava.plan_stages import Job, Settings, dry_run, optimizer_step, prepare
from trl_llava.vision_tower import PROJECTOR_NAMES, TOWER_NAMES


def ppo_moments(job: Job, settings: Settings) -> list[Moment]:
    """The worst moment of each phase of a PPO step, of one process.

    Args:
        job: The stage.
        settings: The settings.

    Returns:
        Moments of images, generation, the passes of all roles, the rewards, the update and the optimizer's step.

    Raises:
        InputError: If a model or an optimizer is of a kind that the plan does not know.
        NotFoundError: If the config of a model cannot be read.
    """
    roles = load_roles(job, settings)
    held = roles.held()
    parameters = trained([roles.policy, roles.value])
    held["optimizer"] = optimizer_states(parameters, job.values["optim"])
    phases = _Phases(job, settings, roles)
    update_rows = settings.rows * settings.accumulation // job.values["num_mini_batches"]
    peaks = {"images": phases.images(), "generation": phases.generation(), "passes": phases.passes()}
    if roles.reward is not None:
        peaks["rewards"] = phases.rewards()
    peaks["update"] = phases.update(accumulated=update_rows > settings.rows)
    kept = Counter({"image features": phases.kept})
    found = [Moment(name, share(held + kept + peak, job.processes)) for name, peak in peaks.items()]
    step = optimizer_step(held + kept, parameters, job)
    return [*found, step]


class _Phases:
    """The phases of one step, each run dry.

    The rows of a step are asked at once; `settings.rollout_rows` of them run at a time, and in the update
    `settings.rows`. What tower and projector made of the pictures is kept from the first phase to the last.
    """

    def __init__(self, job: Job, settings: Settings, roles: Roles) -> None:
        self.job, self.settings, self.roles = job, settings, roles
        values = job.values
        self.answer = values["response_length"]
        self.length = job.length + self.answer
        self.rows = settings.rows * settings.accumulation
        self.at_once = min(settings.rollout_rows or self.rows, self.rows)
        self.sampling = Sampling(values["temperature"], (), values["logits_chunk_size"])
        self.kept = 0
        self._features: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def images(self) -> Counter[str]:
        """Tower and projector of policy and value model, `local_rollout_forward_batch_size` pictures at a time."""
        prompts = self.rows // self.job.values["num_generations_per_prompt"]
        worst: Counter[str] = Counter()
        for role, model in (("policy", self.roles.policy), ("value", self.roles.value)):
            if _trains_eyes(model):
                continue
            config = self.roles.configs[role]

            def run(trace: MemoryTrace, model: nn.Module = model, role: str = role, config: Any = config) -> None:
                found = encode(model, config, self.at_once, bf16=self.job.bf16)
                self._features[role] = (tuple(found[0].shape), found[0].dtype)

            peak = self._dry(model, run)
            shape, dtype = self._features[role]
            self.kept += prompts * self.job.images * shape[0] * shape[1] * dtype.itemsize
            worst = max(worst, peak, key=lambda parts: parts.total())
        return worst

    def generation(self) -> Counter[str]:
        """The pass over the prompts, or all keys and values of finished answers: whichever is more."""
        found: dict[str, torch.dtype] = {}

        def run(trace: MemoryTrace) -> None:
            found["dtype"] = prefill(
                self.roles.policy,
                self.at_once,
                self.job.length,
                self._seen("policy", self.at_once),
                bf16=self.job.bf16,
            )

        peak = self._dry(self.roles.policy, run)
        config = self.roles.configs["policy"]
        cache = kv_cache(config, self.at_once, self.length, found["dtype"].itemsize)
        vocabulary = config.get_text_config().vocab_size
        last = Counter({"KV cache": cache, "logits": 3 * 4 * self.at_once * vocabulary})  # scores, noise, their sum
        prompt = kv_cache(config, self.at_once, self.job.length, found["dtype"].itemsize)
        peak["KV cache"] = min(prompt, peak["activations"])  # made within the pass, so counted there
        peak["activations"] -= peak["KV cache"]
        return max(last, peak, key=lambda parts: parts.total())

    def passes(self) -> Counter[str]:
        """What policy (reference alike) and value model say of the answers, without gradients."""

        def ask(trace: MemoryTrace) -> None:
            with torch.no_grad(), autocast(self.job.bf16):
                ask_policy(self.roles.policy, self._states("policy", self.at_once), self.sampling, trace)

        def value(trace: MemoryTrace) -> None:
            with torch.no_grad(), autocast(self.job.bf16):
                self._values(self.at_once)

        pairs = [self._dry(self.roles.policy, ask), self._dry(self.roles.value, value)]
        return max(pairs, key=lambda parts: parts.total())

    def rewards(self) -> Counter[str]:
        """The reward model over prompts, answers and judging turns, without gradients; it sees with its own tower."""
        model, config = self.roles.reward, self.roles.configs["reward"]
        length = self.job.judged_length or self.length
        assert model is not None

        def run(trace: MemoryTrace) -> None:
            seen = image_inputs(config, self.at_once * self.job.images)
            with torch.no_grad():
                model(**text_inputs(self.at_once, length), **seen, use_cache=False)

        return self._dry(model, run)

    def update(self, *, accumulated: bool) -> Counter[str]:
        """Forward passes of policy and value model over a micro-batch, then one backward pass through both."""
        policy, value = self.roles.policy, self.roles.value
        for model in (policy, value):
            prepare(model, self.settings, self.job.values["gradient_checkpointing_kwargs"])

        def run(trace: MemoryTrace) -> None:
            with autocast(self.job.bf16):
                logprobs = ask_policy(policy, self._states("policy", self.settings.rows), self.sampling, trace)
                values = self._values(self.settings.rows)
            (logprobs.sum() + values.sum()).backward()

        return dry_run([policy, value], run, accumulated=accumulated, processes=self.job.processes)

    def _dry(self, model: nn.Module, run: Any) -> Counter[str]:
        model.eval()
        peak = dry_run([model], run, accumulated=False, processes=self.job.processes)
        del peak["gradients"]
        return peak

    def _seen(self, role: str, rows: int) -> dict[str, Any]:
        images = rows * self.job.images
        features = None
        if role in self._features:
            shape, dtype = self._features[role]
            features = [torch.empty(shape, dtype=dtype) for _ in range(images)]
        return images_as(features, self.roles.configs[role], images)

    def _states(self, role: str, rows: int) -> torch.Tensor:
        model = self.roles.policy if role == "policy" else self.roles.value
        return response_states(model, rows, self.length, self.answer, self._seen(role, rows))

    def _values(self, rows: int) -> torch.Tensor:
        states = self._states("value", rows)
        model: Any = self.roles.value
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return base.score(states).squeeze(-1).float()


def _trains_eyes(model: nn.Module) -> bool:
    """Whether tower or projector are trained, so that nothing of what they make can be kept."""
    seeing = {*TOWER_NAMES, *PROJECTOR_NAMES}
    return any(p.requires_grad and seeing & set(name.split(".")) for name, p in model.named_parameters())
