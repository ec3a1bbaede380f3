"""Stage 3: PPO whose policy, value and reward see the image."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.base_trainer import _BaseTrainer

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.vllm import require_vllm
from trl_llava.data.collators import PromptCollator
from trl_llava.errors import InputError
from trl_llava.health import check_finite, check_first_step_kl
from trl_llava.models.blank_image import encode_on_every_process
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.families import family_of
from trl_llava.models.gpu_kernels import apply_liger
from trl_llava.models.image_features import encode_images, same_vision
from trl_llava.models.longest_row import positions_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.own_processor import own_processor
from trl_llava.models.vision_tower import trains_vision
from trl_llava.ppo import ppo_math
from trl_llava.ppo.checkpoint import PPOCheckpoints
from trl_llava.ppo.completions import Completions
from trl_llava.ppo.data import collator_of_both, prompt_rows, rollout_loader, sample_batch
from trl_llava.ppo.generation import Generator, suppressed_tokens
from trl_llava.ppo.passes import PolicyAndValue, check_plain_head
from trl_llava.ppo.report import PhaseClock, step_metrics
from trl_llava.ppo.role_passes import RolePasses, can_share_prefix
from trl_llava.ppo.rollout import Rollout
from trl_llava.ppo.samples import completions_table, report_samples
from trl_llava.ppo.scoring import Scorer
from trl_llava.ppo.setup import (
    compute_batch_sizes,
    prepare_roles,
    refuse_launches,
    rounds_alike,
    warm_up_above_zero,
)
from trl_llava.ppo.terminal import shorten_lines
from trl_llava.ppo.update import Updater
from trl_llava.ppo.vllm_prompts import require_served
from trl_llava.publish.trainer import PushesSafely
from trl_llava.rewards.functions import RewardFunction, needs_captions

if TYPE_CHECKING:
    from trl_llava.ppo.vllm_source import VLLMGenerator


@dataclass
class PPOState(TrainerState):
    """transformers' trainer state, and `episode`: on how many completions the run has trained, over all processes."""

    episode: int = 0


class LlavaPPOTrainer(PPOCheckpoints, PushesSafely, _BaseTrainer):
    """PPO with images: `train()` is rollout -> score -> advantages -> update -> log, masked everywhere.

    TRL removed its `PPOTrainer` in 1.13. This one keeps its config's names, its metrics and, on text-only rows, the
    numbers of TRL 1.12 (Apache-2.0), and differs in this: prompts are rows with images; the reward is a sum of
    callables with TRL's reward-function signature instead of a model; the score lands on the last real token; a
    mini-batch is one optimizer step, its loss the mean over its real tokens whatever the accumulation; gradients are
    clipped at `max_grad_norm`.

    Args:
        args: the config.
        processing_class: the policy's processor, by default its own; a tokenizer does where no row has an image.
        model: the policy: a model with a language-modelling head, or a PEFT model around one.
        ref_model: the reference; `None` with a PEFT policy, whose reference is the adapter `args.ref_adapter_name`, or
            the bare base when that is `None` too. `None` with a whole model: a copy of it.
        reward_funcs: reward functions; called with `prompts`, `completions`, `completion_ids` and the rows' columns.
        train_dataset: rows in a format of docs/data.md.
        value_model: a `...ForSequenceClassification` with one label.
        value_processing_class: the value model's processor, if it differs from the policy's.
        data_collator: replaces `PromptCollator(processing_class)`.
        eval_dataset: prompts whose completions are shown and saved.
        optimizers: optimizer and scheduler, instead of those that `args` describes.
        callbacks: further callbacks.
        peft_config: wraps the policy in a fresh adapter.
        captions_column: column with the captions of a row, as for `load_rows`.

    Raises:
        ValueError: if the data set holds less than one batch of rows, the process has another mixed precision, or it
            runs under FSDP.

    Example:
        >>> from datasets import load_dataset
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification
        >>> from trl_llava import FactualReward, LlavaPPOConfig
        >>> base, layers = "llava-hf/llava-1.5-7b-hf", r".*language_model.*_proj"
        >>> value_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        >>> trainer = LlavaPPOTrainer(
        ...     args=LlavaPPOConfig("ppo", total_episodes=10_000, response_length=256),
        ...     model=AutoModelForImageTextToText.from_pretrained(base),
        ...     value_model=get_peft_model(value_model, LoraConfig(target_modules=layers, modules_to_save=["score"])),
        ...     reward_funcs=FactualReward.from_pretrained("org/llava-factual-rm"),
        ...     train_dataset=load_dataset("openbmb/RLAIF-V-Dataset", split="train"),
        ...     peft_config=LoraConfig(target_modules=layers),
        ... )
        >>> trainer.train()
        >>> trainer.save_model()
    """

    stage = "ppo"
    control: TrainerControl
    model: Any
    optimizer: Any
    state: Any

    def __init__(
        self,
        args: LlavaPPOConfig,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        *,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        train_dataset: Dataset,
        value_model: PreTrainedModel | PeftModel,
        value_processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        data_collator: PromptCollator | None = None,
        eval_dataset: Dataset | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        captions_column: str = "captions",
    ) -> None:
        refuse_launches(args)
        require_vllm(args)
        if args.use_vllm:
            require_served(family_of(model.config), str(model.name_or_path))
        if ref_model is model:
            raise ValueError("`ref_model` is `model` itself: pass a copy of it, or None with a PEFT policy.")
        if processing_class is None:
            processing_class = own_processor(model, args)
        set_seed(args.seed)  # before a fresh adapter draws its weights
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.stop_token_id = self.tokenizer.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        self.scorer = Scorer(args, [reward_funcs] if callable(reward_funcs) else reward_funcs)
        rewards = [getattr(function, "model", None) for function in self.scorer.reward_funcs]
        apply_liger([model, ref_model, value_model, *rewards], args)
        captions = needs_captions(self.scorer.reward_funcs)
        collator = data_collator or PromptCollator(processing_class, max_prompt_length=args.max_prompt_length)
        read = {"require_captions": captions, "captions_column": captions_column}
        positions = positions_of(model, room=args.response_length)
        train_dataset = prompt_rows(train_dataset, "train_dataset", collator, args, positions, **read)
        if eval_dataset is not None:
            eval_dataset = prompt_rows(eval_dataset, "eval_dataset", collator, args, positions, **read)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if ref_model is None and not isinstance(model, PeftModel):
            if is_deepspeed_zero3_enabled():
                raise InputError(
                    "under ZeRO-3 a whole policy has no weights to copy for its reference: load `ref_model` anew"
                )
            ref_model = copy.deepcopy(model).requires_grad_(False)
        self.policy_model, self.ref_model, self.value_model = model, ref_model, value_model
        self.completions_per_epoch = len(train_dataset) * args.num_generations_per_prompt
        compute_batch_sizes(args, self.completions_per_epoch, PartialState().num_processes)
        prepare_roles(model, value_model, ref_model, args)
        super().__init__(
            model=PolicyAndValue(model, value_model),
            args=args,
            data_collator=collator_of_both(collator, processing_class, value_processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=callbacks,
        )
        self.state = PPOState(**vars(self.state))
        if args.num_sample_generations > 0:
            steps = self.args.num_total_batches
            self.sample_generations_freq = max(1, steps // args.num_sample_generations)
        shorten_lines(self)
        self.clock = PhaseClock(self.callback_handler, self.accelerator.device)
        self._batches_from(0)  # raises now where an epoch has less than a batch
        self._prepare()
        self._make_phases()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Upstream's, with what it would decide for a single model that is compiled whole."""
        given = super()._build_accelerator_args(**kwargs)
        given["dynamo_plugin"] = TorchDynamoPlugin(backend="no")  # `torch_compile` compiles layers, see ppo/setup.py
        if self.args.ddp_find_unused_parameters is None:
            # A pass of the update uses every trained weight of both roles, but for layers of a tower behind the one
            # whose features are selected.
            vision = any(trains_vision(model) for model in (self.policy_model, self.value_model))
            given["kwargs_handlers"][0].find_unused_parameters = vision
        return given

    def _prepare(self) -> None:
        """Put models, optimizer and schedule where this process computes with them."""
        args, accelerator = self.args, self.accelerator
        collators: Any = self.data_collator
        for role, model in (("policy", self.policy_model), ("value", self.value_model)):
            processor = getattr(collators, role, collators).processor
            encode_on_every_process(model, processor, accelerator, encoded_before=True)
        if (plugin := getattr(accelerator.state, "deepspeed_plugin", None)) is not None:
            # DeepSpeed clips by itself; left at "auto" it would clip at 1.
            plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm or 0.0
        own_schedule = self.lr_scheduler is not None
        self.create_optimizer_and_scheduler(num_training_steps=args.num_total_batches)
        if not own_schedule:
            warm_up_above_zero(self.lr_scheduler, args.get_warmup_steps(args.num_total_batches))
        self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        if self.ref_model is not None and self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(self.ref_model, accelerator)
        elif self.ref_model is not None:
            self.ref_model = self.ref_model.to(accelerator.device)

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches of the whole run, one a step."""
        return self._batches_from(0)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's batches of evaluation prompts, the last one perhaps not full."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        collator: Any = getattr(self.data_collator, "policy", self.data_collator)
        collate = partial(sample_batch, collator=collator)
        loader = DataLoader(rows, self.args.per_device_eval_batch_size, collate_fn=collate)
        return self.accelerator.prepare_data_loader(loader)

    def _make_phases(self) -> None:
        """Make what generates, passes and updates, once the models are prepared."""
        args = self.args
        suppressed = suppressed_tokens(self.policy_model, self.tokenizer)
        self.sampling = Sampling(args.temperature, suppressed, args.logits_chunk_size)
        recompute = args.recompute_logprobs
        if recompute is None:
            recompute = not rounds_alike(self.policy_model, args, self.accelerator)
        tokens = (self.tokenizer, self.stop_token_id)
        self.generator = Generator(args, self.accelerator, *tokens, self.sampling, keep_logprobs=not recompute)
        self.vllm = self._connect_to_vllm() if args.use_vllm else None
        roles = [self.policy_model, self.value_model, *([] if self.ref_model is None else [self.ref_model])]
        self.share_prefix = can_share_prefix(args, roles)
        passes = (self.sampling, self.share_prefix)
        self.roles = RolePasses(args, self.accelerator, self.model, self.ref_model, *passes)
        self.updater = Updater(args, self.accelerator, self.model, self.optimizer, *passes)

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Train for `args.num_total_batches` steps.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last one in `args.output_dir`; the run goes
                on as if it had never stopped.

        Raises:
            UnhealthyRunError: if KL or ratio are off at the first step, a number is not finite, or after an alarm
                with `stop_on_alarm`.
            FileNotFoundError: if there is no such checkpoint.
            DamagedCheckpointError: if it is damaged.
            Stopped: after SIGTERM or Ctrl-C, once all is saved.
        """
        with self.resumable(resume_from_checkpoint) as checkpoint:
            self._begin(checkpoint)
            first = self.state.global_step
            for step, batch in enumerate(self._batches_from(first), start=first + 1):
                self.state.episode += self.args.batch_size
                rollout = self.rollout(batch, step)
                batch.clear()  # the loader's iterator would keep the pixels until the next step
                with self.clock.phase("score"):
                    self.score(rollout, step)
                if step == 1 and self.args.num_sample_generations > 0:  # of the start, normalised as all that follow
                    with self.clock.phase("samples"):
                        self.generate_completions(sampling=True)
                self.compute_advantages(rollout, step)
                update_metrics = self.update(rollout, step)
                self.log_step(rollout, update_metrics)
                del rollout  # before the next one is made
                self._end_step(step)
                if self.control.should_training_stop:
                    break
                self.clock.start()
            self._end()

    def rollout(self, batch: dict[str, Any], step: int) -> Rollout:
        """Complete a batch of prompts, and compute log-probabilities and values of every token.

        The policy runs once more only where generation does not return the log-probabilities that it drew with.

        Args:
            batch: what the collator returns, each prompt once.
            step: the PPO step, counted from 1, which the sampling noise depends on.

        Returns:
            The rollout, not yet scored.
        """
        device = self.accelerator.device
        inputs = ref_inputs = value_inputs = ModelInputs.from_batch(batch, device)
        if "value" in batch:
            value_inputs = ModelInputs.from_batch(batch["value"], device)
        at_once, times = self.args.local_rollout_forward_batch_size, self.args.num_generations_per_prompt
        columns = {
            name: [entry for entry in column for _ in range(times)] for name, column in batch["columns"].items()
        }
        if self.ref_model is not None:
            with torch.no_grad(), self.gathered(self.ref_model) as reference, self.clock.phase("images"):
                ref_inputs = encode_images(reference, ref_inputs, at_once).repeated(times)
        with torch.no_grad(), self.gathered() as model:
            with self.clock.phase("images"):
                together = value_inputs is inputs and same_vision(model.policy, model.value_model)
                inputs = encode_images(model.policy, inputs, at_once).repeated(times)
                if self.ref_model is None and not same_vision(model.policy, model.policy):
                    with self.roles.reference(model.policy) as reference:  # without the policy's adapter on its tower
                        ref_inputs = encode_images(reference, ref_inputs, at_once).repeated(times)
                elif self.ref_model is None:
                    ref_inputs = inputs
                if together:
                    value_inputs = inputs
                else:
                    value_inputs = encode_images(model.value_model, value_inputs, at_once).repeated(times)
            with self.clock.phase("generation"):
                completions = self.generate(model.policy, inputs, columns, step)
        prompts = (inputs, ref_inputs, value_inputs)
        with self.clock.phase("forward"):
            logprobs, ref_logprobs, values = self.roles.logprobs_and_values(*prompts, completions)
        importance = torch.empty(0)
        if self.vllm is not None:
            self.vllm.compare(logprobs, completions.mask, step)
            importance = self.vllm.importance_weights(logprobs, completions.mask)
        return Rollout(
            inputs=inputs,
            value_inputs=value_inputs,
            columns=columns,
            responses=completions.responses,
            mask=completions.mask,
            stopped=completions.stopped,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            importance=importance,
        )

    def generate(
        self, policy: nn.Module, inputs: ModelInputs, columns: dict[str, list], step: int | None
    ) -> Completions:
        """Generate completions: the one place where they come from.

        Args:
            policy: the unwrapped policy, in eval mode and whole on this process.
            inputs: B prompts as the policy sees them, each as often as it is completed.
            columns: the rows' columns (`prompts`, `images`, ...), each a list of B.
            step: the PPO step that the draws depend on; `None` generates greedily.

        Returns:
            The completions.
        """
        if self.vllm is not None:
            return self.vllm.generate(inputs, columns["images"], step)
        return self.generator.generate(policy, inputs, step)

    def score(self, rollout: Rollout, step: int) -> None:
        """Score every completion with the reward functions; fills `scores`, `terms` and `empty`."""
        ids = [row[mask].tolist() for row, mask in zip(rollout.responses, rollout.mask, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rollout.empty = torch.tensor([not text.strip() for text in texts], device=rollout.responses.device)
        completions = [[{"role": "assistant", "content": text.strip()}] for text in texts]
        rollout.scores, rollout.terms = self.scorer(
            completions, ids, rollout.stopped, rollout.columns, step, reduce=self.sum_over_processes
        )

    def compute_advantages(self, rollout: Rollout, step: int) -> None:
        """Turn scores and KL into whitened advantages and returns; fills `kl`, `advantages` and `returns`."""
        args, mask = self.args, rollout.mask
        rollout.kl = ppo_math.kl_per_token(
            rollout.logprobs, rollout.ref_logprobs, mask, args.kl_estimator, clamp=args.clamp_kl
        )
        check_finite("KL", rollout.kl.sum(1), step)
        if args.check_first_step and self.state.global_step == 0:
            check_first_step_kl(rollout.kl.sum(1).mean().item(), args.first_step_kl_tolerance)
        scale = 1.0 if args.whiten_rewards else args.reward_scale
        rewards = ppo_math.shape_rewards(rollout.scores, rollout.kl, mask, args.kl_coef, scale)
        whiten = partial(
            ppo_math.masked_whiten, mask=mask, reduce=self.sum_over_processes, variance=args.whiten_variance
        )
        if args.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        advantages, rollout.returns = ppo_math.gae(rewards, rollout.values, mask, args.gamma, args.lam)
        rollout.advantages = whiten(advantages)

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Train policy and value model on the rollout; returns metrics by TRL's names, over all processes."""
        self.model.train()
        with self.clock.phase("update"):
            return self.updater.train_on(rollout, step, nothing_moved_yet=self.state.global_step == 0)

    # --- what the loop is made of -------------------------------------------------------------------------------

    def sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor, of the same shape on every process."""
        return self.accelerator.reduce(value, reduction="sum")

    @contextmanager
    def gathered(self, prepared: nn.Module | None = None) -> Iterator[Any]:
        """A prepared model (default: policy and value model together), unwrapped, in eval mode, whole everywhere.

        Inside, processes may run different numbers of passes, as when one of them has no image to encode.
        """
        prepared = self.model if prepared is None else prepared
        prepared.eval()
        gather = self.args.ds3_gather_for_generation
        with unwrap_model_for_generation(prepared, self.accelerator, gather_deepspeed3_params=gather) as model:
            yield model

    def _connect_to_vllm(self) -> "VLLMGenerator":
        from trl_llava.ppo.vllm_source import VLLMGenerator  # imports vLLM, which costs seconds and GPU memory

        policy = self.accelerator.unwrap_model(self.model).policy
        tokens = (self.stop_token_id, list(self.sampling.suppressed))
        return VLLMGenerator(
            self.args, self.accelerator, self.processing_class, policy, *tokens, updates=lambda: self.state.global_step
        )

    # --- around the loop ----------------------------------------------------------------------------------------

    def _begin(self, checkpoint: str | None) -> None:
        args = self.args
        self.state.global_step = 0
        self.state.episode = 0
        if checkpoint is not None:
            self.restore(checkpoint)
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = args.total_episodes / self.completions_per_epoch
        self.state.compute_steps(args, self.state.max_steps)
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped = self.model
        with self.gathered() as model, self.accelerator.autocast():
            check_plain_head(model.policy)
        self.train_start = time.perf_counter()
        self.first_episode = self.state.episode
        self.clock.start()
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)

    def _batches_from(self, step: int) -> DataLoader:
        return rollout_loader(self.train_dataset, self.data_collator, self.args, self.accelerator, step)

    def log_step(self, rollout: Rollout, update_metrics: dict[str, float]) -> None:
        """Log the step's metrics and where its time went."""
        gather = self.accelerator.gather
        metrics = step_metrics(rollout, update_metrics, self.args.kl_coef, gather, self.sum_over_processes)
        metrics |= self.clock.metrics() | ({} if self.vllm is None else self.vllm.differences)
        metrics["tokens_per_second"] = self.sum_over_processes(rollout.mask.sum()).item() / metrics["time/step"]
        episodes = self.state.episode - self.first_episode
        metrics["eps"] = episodes / (time.perf_counter() - self.train_start)
        metrics["lr"] = self.lr_scheduler.get_last_lr()[0]
        metrics["episode"] = self.state.episode
        self.state.epoch = self.state.episode / self.completions_per_epoch
        self.state.global_step += 1
        self.log(metrics)

    def _end_step(self, step: int) -> None:
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.args.num_sample_generations > 0 and step % self.sample_generations_freq == 0:
            self.generate_completions(sampling=True)  # before the save, or a kill between them would lose the table
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _end(self) -> None:
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def generate_completions(self, sampling: bool = False) -> None:
        """Complete prompts of the evaluation set greedily; print some, and save all with images and rewards.

        The table goes to `output_dir/completions/`, where TRL's `GRPOTrainer` has its own, and to W&B and trackio.

        Args:
            sampling: `True` stops after one batch, which has the same prompts each time.
        """
        if self.eval_dataset is None:
            return
        step = self.state.global_step
        gather = partial(self.accelerator.gather_for_metrics, use_gather_object=True)
        batches = self.get_eval_dataloader()
        table = completions_table(batches, self.complete_greedily, self.tokenizer, step, gather, first_only=sampling)
        if table is None:
            return
        if self.accelerator.is_main_process:
            report_samples(table, self.args, step)
        if sampling:
            scores = {"": table["score"].mean(), "_std": table["score"].std(ddof=0)}
            self.log({f"eval_objective/scores{end}": float(value) for end, value in scores.items()})

    def complete_greedily(self, batch: dict[str, Any]) -> Rollout:
        """Complete a batch greedily and score it; log-probabilities and values of the rollout stay empty."""
        inputs = ModelInputs.from_batch(batch, self.accelerator.device)
        with torch.no_grad(), self.gathered() as model:
            completions = self.generate(model.policy, inputs, batch["columns"], step=None)
        nothing = torch.zeros(len(inputs), 0, device=self.accelerator.device)
        known = (completions.responses, completions.mask, completions.stopped)
        rollout = Rollout(inputs, inputs, batch["columns"], *known, nothing, nothing, nothing)
        self.score(rollout, self.state.global_step)
        return rollout
