"""Stage 3: PPO whose policy, value and reward see the image."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo import ppo_trainer as upstream
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.vllm import require_vllm
from trl_llava.data.collators import PromptCollator
from trl_llava.health import check_finite, check_first_step_kl
from trl_llava.models.blank_picture import look_on_every_process
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.gpu_kernels import apply_liger
from trl_llava.models.image_features import GIB, ImageFeatures
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.shared_weights import shares_weights
from trl_llava.ppo import ppo_math
from trl_llava.ppo.answers import Answers
from trl_llava.ppo.ask import RoleQuestions, can_share_prefix
from trl_llava.ppo.data import collator_of_both, prompt_rows, rollout_loader
from trl_llava.ppo.generation import Generator, suppressed_tokens
from trl_llava.ppo.passes import PolicyAndValue, check_plain_head
from trl_llava.ppo.report import PhaseClock, answered_table, report_samples, step_metrics
from trl_llava.ppo.resume import PPOCheckpoints
from trl_llava.ppo.rollout import Rollout
from trl_llava.ppo.scoring import Scorer
from trl_llava.ppo.setup import (
    check_precision,
    compile_layers,
    honour_max_steps,
    prepare_roles,
    refuse_launches,
    rounds_alike,
    warm_up_above_zero,
)
from trl_llava.ppo.update import PPOUpdate
from trl_llava.publish.trainer import PushesSafely
from trl_llava.rewards.functions import RewardFunction, needs_captions

if TYPE_CHECKING:
    from trl_llava.ppo.vllm_source import VLLMGenerator


@contextmanager
def _no_reward_model_to_shard() -> Iterator[None]:
    """Keep TRL from sharding, under DeepSpeed, the reward model that there is none of: our rewards are functions."""

    def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
        return model if isinstance(model, nn.Identity) else prepare_deepspeed(model, accelerator)

    upstream.prepare_deepspeed = shard
    try:
        yield
    finally:
        upstream.prepare_deepspeed = prepare_deepspeed


class LlavaPPOTrainer(PPOCheckpoints, PushesSafely, PPOTrainer):
    """TRL's `PPOTrainer` with images: `train()` is rollout -> score -> advantages -> update -> log, masked everywhere.

    Differs from TRL's in this: prompts are rows with images; the reward is a sum of callables with TRL's
    reward-function signature instead of a model; the score lands on the last real token; a mini-batch is one optimizer
    step, its loss the mean over its real tokens whatever the accumulation; gradients are clipped at `max_grad_norm`.

    Args:
        args: the config.
        processing_class: the policy's processor (or tokenizer, for text-only rows).
        model: the policy: a model with a language-modelling head, or a PEFT model around one.
        ref_model: the reference; `None` with a PEFT policy, whose reference is the adapter `args.ref_adapter_name`, or
            the bare base when that is `None` too.
        reward_funcs: reward functions; called with `prompts`, `completions`, `completion_ids` and the rows' columns.
        train_dataset: rows with `prompt` and `images`, in the project's or in TRL's format.
        value_model: a `...ForSequenceClassification` with one label.
        value_processing_class: the value model's processor, if it differs from the policy's.
        data_collator: replaces `PromptCollator(processing_class)`.
        eval_dataset: rows to answer for the table of samples.
        optimizers: optimizer and scheduler, instead of those that `args` describes.
        callbacks: further callbacks.
        peft_config: wraps the policy in a fresh adapter.
        image_features: where pictures are encoded; by default one of its own, of `args.image_cache_gib`. A reward
            model that shares the policy's base may have the same one.

    Raises:
        ValueError: if the data set holds less than one batch of rows, the process has another mixed precision, or it
            runs under FSDP.
    """

    stage = "ppo"
    control: TrainerControl

    def __init__(
        self,
        args: LlavaPPOConfig,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        train_dataset: Dataset,
        value_model: PreTrainedModel | PeftModel,
        value_processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        data_collator: PromptCollator | None = None,
        eval_dataset: Dataset | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        image_features: ImageFeatures | None = None,
    ) -> None:
        refuse_launches(args)
        require_vllm(args)
        honour_max_steps(args)
        set_seed(args.seed)  # TRL seeds only after it has drawn the weights of a fresh adapter
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.scorer = Scorer(args, [reward_funcs] if callable(reward_funcs) else reward_funcs)
        rewards = [getattr(function, "model", None) for function in self.scorer.reward_funcs]
        apply_liger([model, ref_model, value_model, *rewards], args)
        captions = needs_captions(self.scorer.reward_funcs)
        collator = data_collator or PromptCollator(processing_class, max_prompt_length=args.max_prompt_length)
        train_dataset = prompt_rows(train_dataset, "train_dataset", collator, args, require_captions=captions)
        if eval_dataset is not None:
            eval_dataset = prompt_rows(eval_dataset, "eval_dataset", collator, args, require_captions=captions)
        self.answers_per_epoch = len(train_dataset) * args.num_generations_per_prompt
        if args.total_episodes is None:  # an epoch asks every prompt once, whatever the number of answers
            args.total_episodes = int(args.num_train_epochs * self.answers_per_epoch)
        # TRL's PPO makes its accelerator without the precision that `args` asks for; it reads this instead.
        precision = {"ACCELERATE_MIXED_PRECISION": args.mixed_precision}
        # `torch_compile` is `compile_layers` here.
        with patch_environment(**precision, ACCELERATE_DYNAMO_BACKEND="no"), _no_reward_model_to_shard():
            super().__init__(
                args=args,
                processing_class=self.tokenizer,
                model=model,
                ref_model=ref_model,
                # TRL moves its reward model to the device; our reward functions place their models themselves.
                reward_model=nn.Identity(),
                train_dataset=train_dataset,
                value_model=value_model,
                data_collator=collator_of_both(collator, processing_class, value_processing_class),
                eval_dataset=eval_dataset,
                optimizers=optimizers,
                callbacks=callbacks,
                peft_config=peft_config,
            )
        check_precision(args, self.accelerator)
        self.processing_class = self.callback_handler.processing_class = processing_class
        self.clock = PhaseClock(self.callback_handler)
        self.dataloader = self._batches_from(0)
        if eval_dataset is not None:  # TRL's loader drops a last batch that is not full, which may be the only one
            eval_loader = DataLoader(eval_dataset, args.per_device_eval_batch_size, collate_fn=collator)
            self.eval_dataloader = self.accelerator.prepare(eval_loader)
        self.image_features = ImageFeatures(args.image_cache_gib * GIB) if image_features is None else image_features
        self._make_phases()

    def _make_phases(self) -> None:
        """What generates, asks and updates, once the models are prepared."""
        args = self.args
        if self.ref_model is not None:
            compile_layers(self.ref_model, args)
        if shares_weights(self.accelerator):  # only ahead of the passes may processes run a tower unequally often
            self.image_features.max_bytes = math.inf
        self.sampling = Sampling(args.temperature, suppressed_tokens(self.policy_model), args.logits_chunk_size)
        recompute = args.recompute_logprobs
        if recompute is None:
            recompute = not rounds_alike(self.policy_model, args, self.accelerator)
        tokens = (self.tokenizer, self.stop_token_id)
        self.generator = Generator(args, self.accelerator, *tokens, self.sampling, keep_logprobs=not recompute)
        self.vllm = self._connect_to_vllm() if args.use_vllm else None
        roles = [self.policy_model, self.value_model, *([] if self.ref_model is None else [self.ref_model])]
        self.share_prefix = can_share_prefix(args, roles)
        passes = (self.sampling, self.share_prefix)
        self.ask = RoleQuestions(args, self.accelerator, self.model, self.ref_model, *passes)
        self.ppo_update = PPOUpdate(args, self.accelerator, self.model, self.optimizer, *passes)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Put both models under our own roof first: TRL calls this between building its wrapper and preparing it.

        Args:
            num_training_steps: number of PPO steps.
        """
        self.model = PolicyAndValue(self.policy_model, self.value_model)
        prepare_roles([self.policy_model, self.value_model], self.args, self.accelerator)
        collators: Any = self.data_collator
        policy, value = getattr(collators, "policy", collators), getattr(collators, "value", collators)
        for model, collator in ((self.policy_model, policy), (self.value_model, value)):
            look_on_every_process(model, collator.processor, self.accelerator, encoded_before=True)
        own_schedule = self.lr_scheduler is not None
        super().create_optimizer_and_scheduler(num_training_steps)
        if not own_schedule:
            warm_up_above_zero(self.lr_scheduler, self.args.get_warmup_steps(num_training_steps))

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Train for `args.num_total_batches` steps.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last one in `args.output_dir`; the run goes
                on as if it had never stopped.

        Raises:
            UnhealthyRunError: if KL or ratio are off at the first step, or a number is not finite.
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
                self.score(rollout, step)
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
        """Answer a batch of prompts, and ask policy, reference and value about every token of the answers.

        The policy is asked only where generation does not tell the log-probabilities that it drew with.

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
        self.image_features.begin_step()
        if self.ref_model is not None:  # else the reference sees with the policy's tower
            with torch.no_grad(), self.gathered(self.ref_model) as reference, self.clock.phase("images"):
                ref_inputs = self.image_features.encode(reference, ref_inputs, at_once).repeated(times)
        with torch.no_grad(), self.gathered() as model:
            with self.clock.phase("images"):
                value_inputs = self.image_features.encode(model.value_model, value_inputs, at_once).repeated(times)
                inputs = self.image_features.encode(model.policy, inputs, at_once).repeated(times)
            with self.clock.phase("generation"):
                answers = self.generate(model.policy, inputs, columns, step)
        prompts = (inputs, inputs if self.ref_model is None else ref_inputs, value_inputs)
        with self.clock.phase("forward"):
            logprobs, ref_logprobs, values = self.ask(*prompts, answers)
        if self.vllm is not None:
            self.vllm.compare(logprobs, answers.mask, step)
        return Rollout(
            inputs=inputs,
            value_inputs=value_inputs,
            columns=columns,
            responses=answers.responses,
            mask=answers.mask,
            stopped=answers.stopped,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
        )

    def generate(self, policy: nn.Module, inputs: ModelInputs, columns: dict[str, list], step: int | None) -> Answers:
        """Answer prompts: the one place where answers come from.

        Args:
            policy: the unwrapped policy, in eval mode and whole on this process.
            inputs: B prompts as the policy sees them, each as often as it is answered.
            columns: the rows' columns (`prompts`, `images`, ...), each a list of B.
            step: the PPO step that the draws depend on; `None` answers greedily.

        Returns:
            The answers.
        """
        if self.vllm is not None:
            return self.vllm(inputs, columns["images"], step)
        return self.generator(policy, inputs, step)

    def score(self, rollout: Rollout, step: int) -> None:
        """Ask the reward functions for the score of every answer; fills `scores` and `terms`.

        Args:
            rollout: B answers.
            step: the PPO step, counted from 1.

        Raises:
            UnhealthyRunError: if a reward is not finite.
        """
        with self.clock.phase("score"):
            ids = [row[mask].tolist() for row, mask in zip(rollout.responses, rollout.mask, strict=True)]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            completions = [[{"role": "assistant", "content": text.strip()}] for text in texts]
            rollout.scores, rollout.terms = self.scorer(
                completions, ids, rollout.stopped, rollout.columns, step, reduce=self.sum_over_processes
            )

    def compute_advantages(self, rollout: Rollout, step: int) -> None:
        """Turn scores and KL into whitened advantages and returns; fills `kl`, `advantages` and `returns`.

        Args:
            rollout: B scored answers.
            step: the PPO step, counted from 1.

        Raises:
            UnhealthyRunError: if the KL is not 0 before the first update.
        """
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
        """Train policy and value on the rollout.

        Args:
            rollout: B answers with advantages.
            step: the PPO step, counted from 1.

        Returns:
            Metrics by TRL's names, over all processes.

        Raises:
            UnhealthyRunError: if a ratio is not 1 before the first update, or loss or gradient are not finite.
        """
        self.model.train()
        with self.clock.phase("update"):
            return self.ppo_update(rollout, step, nothing_moved_yet=self.state.global_step == 0)

    # --- what the loop is made of -------------------------------------------------------------------------------

    def sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes.

        Args:
            value: any tensor, of the same shape everywhere.

        Returns:
            The sum, on every process.
        """
        return self.accelerator.reduce(value, reduction="sum")

    @contextmanager
    def gathered(self, prepared: nn.Module | None = None) -> Iterator[Any]:
        """A model unwrapped, in eval mode and whole on every process.

        Inside, processes may run different numbers of passes, as when one of them has no image to encode.

        Args:
            prepared: a prepared model; by default policy and value model together.

        Yields:
            The model.
        """
        prepared = self.model if prepared is None else prepared
        prepared.eval()
        gather = self.args.ds3_gather_for_generation
        with unwrap_model_for_generation(prepared, self.accelerator, gather_deepspeed3_params=gather) as model:
            yield model

    def _connect_to_vllm(self) -> "VLLMGenerator":
        from trl_llava.ppo.vllm_source import VLLMGenerator  # takes vLLM along, which takes its time and the GPU

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
        self.state.num_train_epochs = args.total_episodes / self.answers_per_epoch
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
        """Log the step's metrics and where its time went.

        Args:
            rollout: the finished rollout.
            update_metrics: what `update` returned.
        """
        gather = self.accelerator.gather
        metrics = step_metrics(rollout, update_metrics, self.args.kl_coef, gather, self.sum_over_processes)
        metrics |= self.clock.metrics() | ({} if self.vllm is None else self.vllm.differences)
        metrics["tokens_per_second"] = self.sum_over_processes(rollout.mask.sum()).item() / metrics["time/step"]
        episodes = self.state.episode - self.first_episode
        metrics["eps"] = episodes / (time.perf_counter() - self.train_start)
        metrics["lr"] = self.lr_scheduler.get_last_lr()[0]
        metrics["episode"] = self.state.episode
        self.state.epoch = self.state.episode / self.answers_per_epoch
        self.state.global_step += 1
        self.log(metrics)

    def _end_step(self, step: int) -> None:
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.args.num_sample_generations > 0 and (step - 1) % self.sample_generations_freq == 0:
            self.generate_completions(sampling=True)  # before the save, or a kill between them would lose the table
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _end(self) -> None:
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def generate_completions(self, sampling: bool = False) -> None:
        """Answer questions of the evaluation set greedily; print some, and save all with their rewards.

        The table goes to `output_dir/completions/`, as TRL's `GRPOTrainer` does it.

        Args:
            sampling: `True` stops after one batch.
        """
        if self.eval_dataset is None:
            return
        table = answered_table(self.eval_dataloader, self.answer, self.tokenizer, first_only=sampling)
        if table is not None and self.accelerator.is_main_process:
            report_samples(table, self.args, self.state.global_step)

    def answer(self, batch: dict[str, Any]) -> Rollout:
        """Answer a batch greedily and score it, without asking policy, reference or value about its tokens.

        Args:
            batch: what the collator returns, B rows.

        Returns:
            A rollout with responses, mask, scores and terms; log-probabilities and values are empty.
        """
        inputs = ModelInputs.from_batch(batch, self.accelerator.device)
        with torch.no_grad(), self.gathered() as model:
            answers = self.generate(model.policy, inputs, batch["columns"], step=None)
        nothing = torch.zeros(len(inputs), 0, device=self.accelerator.device)
        told = (answers.responses, answers.mask, answers.stopped)
        rollout = Rollout(inputs, inputs, batch["columns"], *told, nothing, nothing, nothing)
        self.score(rollout, self.state.global_step)
        return rollout
