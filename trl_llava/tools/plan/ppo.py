"""The worst moment of each phase of a PPO step: PPO's own generation, passes and update, on models without memory.

Letters: `B` batch, `R` response length.
"""

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from trl_llava.models.chunked_head import Sampling
from trl_llava.models.image_features import encode_images
from trl_llava.models.model_inputs import ImageFeatures, ModelInputs, split_by_rows
from trl_llava.models.shared_prefix import pack_groups, why_not
from trl_llava.ppo.completions import Completions
from trl_llava.ppo.generation import Generator, suppressed_tokens
from trl_llava.ppo.generation_batches import CPU_GIB, GIB, SHARE_OF_FREE, bytes_per_token, rows_at_once
from trl_llava.ppo.passes import PolicyAndValue
from trl_llava.ppo.role_passes import RolePasses
from trl_llava.ppo.rollout import Rollout
from trl_llava.ppo.setup import prepare_roles
from trl_llava.ppo.update import Updater
from trl_llava.tools.plan.dry_run import dry_run
from trl_llava.tools.plan.formulas import ALONE, kv_cache, trained
from trl_llava.tools.plan.inputs import image_inputs, text_inputs, token_kinds
from trl_llava.tools.plan.job import Job, Moment, Need, Settings
from trl_llava.tools.plan.no_memory import NoMemory
from trl_llava.tools.plan.roles import Roles, load_roles
from trl_llava.tools.plan.shapes import Shape, largest
from trl_llava.tools.plan.starts import judged_length
from trl_llava.tools.plan.supervised import between_steps, optimizer_step

JUDGING = 512
"""Tokens that a judging turn with captions is taken to have, where nothing says how many."""

HOST = torch.device("cuda", 0)
"""Where image features lie between passes: dry runs are on the CPU, so any other device shows what is copied to it."""


def ppo_need(job: Job, settings: Settings) -> Need:
    """What a PPO step needs: moments of all its phases, and the image features on the CPU."""
    roles = load_roles(job, settings)
    job = replace(job, processes=job.processes.for_width(roles.config("policy").get_text_config().hidden_size))
    phases = _Phases(job, settings, roles)
    peaks = {"images": phases.images(), "generation": phases.generation()}
    if job.processes.zero_stage == 3 and job.args.ds3_gather_for_generation:
        for peak in peaks.values():  # all of it, besides each process's share
            peak["gathered weights"] = roles.held(but="reward").total()
    peaks["passes"] = phases.passes()
    if roles.reward is not None:
        peaks["rewards"] = phases.rewards()
    peaks["update"] = phases.update()
    moments = [Moment(name, phases.held + peak) for name, peak in peaks.items()]
    moments.append(optimizer_step(phases.held, phases.parameters, job))
    return Need(moments, phases.host, [*roles.notes, *phases.notes])


class _Phases:
    """The phases of one step, each run dry.

    Completions of a step's prompts are generated at once; `settings.rollout_rows` of them run at a time, and in the
    update `settings.rows`, or fewer where `max_tokens_per_micro_batch` is less.
    """

    def __init__(self, job: Job, settings: Settings, roles: Roles) -> None:
        self.job, self.settings, self.roles = job, settings, roles
        self.args = copy.copy(job.args)
        self.args.gradient_checkpointing, self.args.torch_compile = settings.checkpointing, False
        prepare_roles(roles.policy, roles.value, roles.reference, self.args)
        self.without_memory = NoMemory()
        for model in roles.named().values():
            self.without_memory.take(model)
        self.parameters = trained([roles.policy, roles.value])
        shared_out = roles.held(job.processes, but="reward")
        self.held = shared_out + roles.held(only="reward") + between_steps(self.parameters, job)
        AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the precision of an earlier one
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16" if job.autocast else "no")
        self.response = self.args.response_length
        self.rows = settings.rows * settings.accumulation
        self.at_once = min(settings.rollout_rows or self.rows, self.rows)
        self.completions = self.args.num_generations_per_prompt
        passing = (roles.policy, roles.value, roles.reference)
        wanted = self.args.share_prefix and self.completions > 1
        self.packed = wanted and not any(model is not None and why_not(model) for model in passing)
        self.sampling = Sampling(self.args.temperature, suppressed_tokens(roles.policy), self.args.logits_chunk_size)
        self.host: Counter[str] = Counter()
        self.notes: list[str] = []
        self._features: dict[str, ImageFeatures] = {}  # by role, of the images of one row

    def images(self) -> Counter[str]:
        """Tower and projector of each role but the reward, `local_rollout_forward_batch_size` prompts at a time."""
        prompts, worst = self.rows // self.completions, Counter[str]()
        for role, model in self.roles.named().items():
            if role == "reward" or not self.job.images:
                continue
            peak, features = self._encoded(model, self._inputs(role, Shape(min(self.at_once, prompts), 1, 1)))
            if features is None:  # tower or projector are trained, and run in every pass
                continue
            self._features[role] = ImageFeatures(features.rows[:1], features.form)
            if role not in self.roles.sharing:
                self.host["image features of a step"] += prompts * self._features_of_row(role)
            worst = max(worst, peak, key=Counter.total)
        return worst

    def _features_of_row(self, role: str) -> int:
        """Bytes of the features of one row's images."""
        return sum(feature.nbytes for feature in self._features[role].rows[0])

    def _encoded(self, model: nn.Module, inputs: ModelInputs) -> tuple[Counter[str], ImageFeatures | None]:
        found: list[ModelInputs] = []
        peak = self._dry([model], lambda: found.append(encode_images(model, inputs, self.at_once)))
        return peak, found[0].features

    def generation(self) -> Counter[str]:
        """The pass over the prompts, or all keys and values of finished completions: whichever is more."""
        config, policy = self.roles.config("policy"), self.roles.policy
        rows = self._generated_at_once()
        shape = Shape(math.ceil(rows / self.completions), self.completions, self.job.length)
        # Without memory, every token that is drawn is 1: all rows end behind the first.
        ends_at, no_tokenizer = 1, SimpleNamespace(pad_token_id=0)
        generator = Generator(self.args, self.accelerator, no_tokenizer, ends_at, self.sampling)
        generator.batches.bound = sys.maxsize
        inputs = self._inputs("policy", shape)
        peak = self._dry([policy], partial(generator.generate, policy, inputs, 1))
        number = self._number()
        last = Counter({"KV cache": kv_cache(config, rows, self._length, number)})
        last["logits"] = 3 * 4 * rows * config.get_text_config().vocab_size  # scores, noise, their sum
        if "policy" in self._features:
            last["image features"] = shape.prompts * self._features_of_row("policy")
        first = kv_cache(config, shape.prompts, self.job.length, number)
        peak["KV cache"] = min(first, peak["activations"])  # made within the pass, so counted there
        peak["activations"] -= peak["KV cache"]
        return max(last, peak, key=Counter.total)

    @property
    def _length(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return self.job.length + self.response

    def _number(self) -> int:
        """Bytes of a number of keys and values."""
        policy: Any = self.roles.policy
        return policy.get_input_embeddings().weight.dtype.itemsize

    def _generated_at_once(self) -> int:
        """Rows of a batch of generation, as `generation_batches` sizes it."""
        gib = self.args.generation_cache_gib
        said = f"generation_cache_gib {gib}"
        if gib is not None:
            bound = gib * GIB
        elif self.job.limit is None:
            bound, said = CPU_GIB * GIB, "generation_cache_gib on a CPU"
        else:
            bound, said = SHARE_OF_FREE * (self.job.limit - self.held.total()), "half of what is free then"
        row = bytes_per_token(self.roles.config("policy"), self._number()) * self._length
        rows = rows_at_once(row, bound, self.at_once)
        self.notes.append(
            f"generation answers {rows} rows at once: {row / GIB:.3g} GiB of keys and values each, at most "
            f"{self.at_once} (local_rollout_forward_batch_size) and {max(bound, 0) / GIB:.3g} GiB ({said})"
        )
        return rows

    def passes(self) -> Counter[str]:
        """The passes of policy, reference and value model over the rollout, without gradients."""
        roles = self.roles
        both = PolicyAndValue(roles.policy, roles.value)
        passes = RolePasses(self._one_part(), self.accelerator, both, roles.reference, self.sampling, self.packed)
        models = [model for role, model in roles.named().items() if role != "reward"]
        worst: Counter[str] = Counter()
        for shape in self._shapes(self.at_once, self.packed):
            inputs = {role: self._inputs(role, shape) for role in roles.named() if role != "reward"}
            prompts = (inputs["policy"], inputs.get("reference", inputs["policy"]), inputs["value"])
            run = partial(passes.logprobs_and_values, *prompts, self._completions(shape))
            worst = max(worst, self._dry(models, run), key=Counter.total)
        return worst

    def rewards(self) -> Counter[str]:
        """The reward model over prompts, completions and judging turns, without gradients or autocast."""
        model, length = self.roles.reward, self._judged_length()
        assert model is not None
        packed = why_not(model) is None  # as in `FactualReward`, what the completions of a prompt share runs once
        prompt = min(self.job.length, length - 1)
        budget, worst = self.args.max_tokens_per_micro_batch, Counter[str]()
        for shape in largest(self.at_once, self.completions if packed else 1, prompt, length - prompt, budget):
            text = text_inputs(shape.rows, shape.length + length - prompt)
            if packed:
                rows = [[1] * shape.length + [2 + place] * (length - prompt) for place in range(shape.completions)]
                groups = [row // shape.completions for row in range(shape.rows)]
                text = pack_groups(rows * shape.prompts, groups).packed._asdict()
            batch = {**text, **self._images("reward", shape.prompts)}
            run = torch.no_grad()(partial(model, **batch, use_cache=False))
            worst = max(worst, self._dry([model], run, batch), key=Counter.total)
        return worst

    def _judged_length(self) -> int:
        """Tokens that the reward model reads: as many as it was trained on at most, if a recipe says that."""
        if self.job.judged_length is not None:
            return self.job.judged_length
        found = judged_length(self.args.reward_model_path, self.job.sources)
        supposed = (self._length + JUDGING, f"{self._length} of prompt and answer, {JUDGING} for its turn")
        length, said = found or supposed
        self.notes.append(f"the reward model reads {length} tokens a row ({said}): --judged_length says otherwise")
        return length

    def update(self) -> Counter[str]:
        """A micro-batch's forward passes of policy and value model, then one backward pass through both."""
        policy, value, settings = self.roles.policy, self.roles.value, self.settings
        # A mini-batch is drawn from all rows: it may hold one completion of each prompt, or all those of some.
        shapes = self._shapes(settings.rows, self.packed)
        if self.packed and self.args.num_mini_batches > 1 and self.rows // self.completions >= settings.rows:
            shapes += self._shapes(settings.rows, False)
        accumulated = self.rows // self.args.num_mini_batches > settings.rows
        model = self.accelerator.prepare_model(PolicyAndValue(policy, value), device_placement=False)
        optimizer: Any = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
        updater = Updater(self._one_part(), self.accelerator, model, optimizer, self.sampling, self.packed)
        worst: Counter[str] = Counter()
        for shape in shapes:
            model.train()
            run = partial(updater.train_on, self._rollout(shape), 1, nothing_moved_yet=False)
            more = accumulated or shape.rows < settings.rows
            peak = dry_run([policy, value], run, self.without_memory, self.job.processes, accumulated=more)
            worst = max(worst, peak, key=Counter.total)
        return worst

    def _one_part(self) -> Any:
        """The config under which all rows are one mini-batch and one micro-batch."""
        args = copy.copy(self.args)
        args.per_device_train_batch_size = args.local_rollout_forward_batch_size = self.rows
        args.max_tokens_per_micro_batch, args.num_mini_batches, args.num_ppo_epochs = None, 1, 1
        return args

    def _shapes(self, most: int, packed: bool) -> list[Shape]:
        completions = min(self.completions, most) if packed else 1
        return largest(most, completions, self.job.length, self.response, self.args.max_tokens_per_micro_batch)

    def _dry(
        self, models: list[nn.Module], run: Callable[[], Any], batch: dict[str, torch.Tensor] | None = None
    ) -> Counter[str]:
        for model in models:
            model.eval()
        processes = ALONE if models == [self.roles.reward] else self.job.processes
        peak = dry_run(models, run, self.without_memory, processes, accumulated=False, batch=batch or {})
        del peak["gradients"]
        return peak

    def _images(self, role: str, prompts: int) -> dict[str, torch.Tensor]:
        most = self.job.length // max(1, self.job.images)
        return image_inputs(self.roles.config(role), prompts * self.job.images, self.without_memory.fake, most)

    def _inputs(self, role: str, shape: Shape) -> ModelInputs:
        """A micro-batch's prompts as a role reads them, with image features where they are made once a step."""
        text = text_inputs(shape.prompts, shape.length, left=True)
        kinds = token_kinds(self.roles.config(role), shape.prompts, shape.length)
        inputs = ModelInputs(text["input_ids"], text["attention_mask"], tokens=kinds)
        if role in self._features:
            one = self._features[role]
            with self.without_memory.fake:
                rows = [[own.new_empty(own.shape, device=HOST) for own in one.rows[0]] for _ in range(shape.prompts)]
            inputs.features = ImageFeatures(rows, one.form)
        else:
            images = self._images(role, shape.prompts)
            counts = {name: [len(tensor) // shape.prompts] * shape.prompts for name, tensor in images.items()}
            inputs.images = split_by_rows(images, counts)
        return inputs.repeated(shape.completions)

    def _completions(self, shape: Shape) -> Completions:
        return Completions.from_tokens(torch.ones(shape.rows, self.response, dtype=torch.long), None)

    def _rollout(self, shape: Shape) -> Rollout:
        responses, mask, stopped, _ = self._completions(shape)
        numbers = torch.zeros(mask.shape)
        return Rollout(
            inputs=self._inputs("policy", shape),
            value_inputs=self._inputs("value", shape),
            columns={},
            responses=responses,
            mask=mask,
            stopped=stopped,
            logprobs=numbers,
            ref_logprobs=numbers,
            values=numbers,
            advantages=numbers,
            returns=numbers,
        )
