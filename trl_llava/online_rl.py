"""What GRPO and RLOO do alike: all but the trainer."""

import inspect
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import ProcessorMixin, Trainer, set_seed

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.collators import PromptCollator
from trl_llava.data.image_tensors import image_input_names
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.thumbnails import made_small
from trl_llava.data.token_kinds import kinds_name, kinds_of
from trl_llava.data.trl_rows import as_trl_reads
from trl_llava.errors import RecipeError
from trl_llava.models.families import family_of_processor
from trl_llava.models.longest_row import positions_of
from trl_llava.models.model_inputs import COUNTS
from trl_llava.models.starts import load_policy_start, load_recipe_processor
from trl_llava.ppo.generation import suppressed_tokens
from trl_llava.prompts import Message, message_text
from trl_llava.rewards.functions import RewardFunction, needs_captions
from trl_llava.rewards.reward_loading import load_reward_functions
from trl_llava.rewards.reward_terms import length_term
from trl_llava.run.generation_buffer import ResumableGenerations
from trl_llava.stage_run import begin


class OwnModelInputs:
    """Gives the model what its family reads of each token, where TRL's trainers hand on something else.

    They count a BOS of the chat template twice, and take a completion's tokens for those of the prompt, which
    PaliGemma lets see what follows. LLaVA-OneVision's count of the images of each row (`batch_num_images`) they do not
    hand on at all: its model then takes each image for the only one of its row, which rows must have (`one_image`).
    """

    processing_class: ProcessorMixin

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        batch_num_images: Any = None,
        **kwargs: Any,
    ) -> Any:
        name = kinds_name(self.processing_class)
        if name is not None:
            kwargs[name] = self._kinds(input_ids, attention_mask, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]  # TRL's trainer
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _kinds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> torch.Tensor:
        """(B, L) what kind each token is, of prompts and completions."""
        family = family_of_processor(self.processing_class)
        if family is not None and family.attends_to_whole_prompt:
            kinds = torch.zeros_like(input_ids)
            kinds[:, -completion_length:] = 1
            return kinds
        found = torch.tensor(kinds_of(self.processing_class, input_ids.tolist()), device=input_ids.device)
        return found * attention_mask


class SampleLogs:
    """Adds to TRL's tables of completions (`log_completions`) the captions of a row and the names of its images.

    The trackers get small images: TRL hands them on as large as they are. The log gets `completions/empty_ratio`.
    """

    args: Any
    _logs: dict[str, Any]

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[list[Message]], *args: Any
    ) -> torch.Tensor:
        empty = [not message_text(completion[-1]).strip() for completion in completions]
        self._log_metric("completions/empty_ratio", fmean(empty))  # type: ignore[attr-defined]  # TRL's trainer
        if self.args.log_completions:
            for column in ("captions", "image_names"):
                if column in inputs[0]:
                    self._log_completion_extra(column, [row[column] for row in inputs])  # type: ignore[attr-defined]
        return super()._calculate_rewards(inputs, prompts, completions, *args)  # type: ignore[misc]  # TRL's trainer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's, which also fills the tables."""
        for place, images in enumerate(self._logs["images"]):
            self._logs["images"][place] = [made_small(image) for image in images or []]
        for column in ("prompt", "completion"):
            for place, logged in enumerate(self._logs[column]):
                if isinstance(logged, list):  # since TRL 1.16 messages with image parts, which W&B's tables refuse
                    self._logs[column][place] = message_text(logged[-1])
        super().log(logs, start_time)  # type: ignore[misc]


def run_online(stage: str, trainer_class: type[Trainer], args: Sequence[str] | None) -> Any:
    """Runs TRL's `GRPOTrainer` or `RLOOTrainer` with the factual reward, and returns it."""
    run = begin(stage, args)
    training_args, model_args = run.training_args, run.model_args
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    one_image = _allows_one_image_only(processor, trainer_class)
    rewards = _load_rewards(training_args, model_args)
    collator = PromptCollator(processor, training_args.max_prompt_length)
    room = training_args.max_completion_length or 0
    positions = positions_of(model_args.model_name_or_path, room=room, revision=model_args.model_revision)
    fit = partial(drop_overlong, collator=collator, overlong=training_args.overlong, positions=positions)
    train_rows, eval_rows = (
        None if rows is None else as_trl_reads(fit(rows), one_image=one_image)
        for rows in run.load_rows("prompt", require_captions=needs_captions(rewards))
    )
    set_seed(training_args.seed)  # TRL seeds only after it has drawn the weights of a fresh adapter
    model, peft_config = load_policy_start(model_args)
    # An image token in a completion has no image: the next forward pass would stop at it.
    suppressed = {"suppress_tokens": suppressed_tokens(model)}
    training_args.generation_kwargs = {**(training_args.generation_kwargs or {}), **suppressed}
    trainer = type(trainer_class.__name__, (ResumableGenerations, SampleLogs, OwnModelInputs, trainer_class), {})(
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    return run.train(trainer, model_args.model_name_or_path)


def _allows_one_image_only(processor: ProcessorMixin, trainer_class: Any) -> bool:
    """Whether rows may have one image only; refuses a family whose inputs TRL's trainer does not hand to the model."""
    handed_on = inspect.signature(trainer_class._get_per_token_logps_and_entropies).parameters
    unknown = sorted(image_input_names(processor) - set(handed_on))
    if unknown and unknown != [COUNTS]:
        raise RecipeError(
            f"TRL's {trainer_class.__name__} does not know {', '.join(unknown)}, which {type(processor).__name__} "
            "makes: train this model with `trl-llava ppo` or `dpo`, or choose one of another family."
        )
    return bool(unknown)


def _load_rewards(args: Any, model_args: LlavaModelConfig) -> list[RewardFunction]:
    """The reward model, the recipe's functions and the length term, in this order."""
    rewards = load_reward_functions(
        args.reward_model_path,
        args.reward_model_revision,
        args.reward_funcs,
        model_args,
        batch_size=args.reward_batch_size,
        device=PartialState().device,
    )
    if args.length_coef is not None:
        limit, coef = args.max_completion_length, args.length_coef

        def length(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
            return length_term(completion_ids, response_length=limit, coef=coef, **columns)

        rewards.append(length)
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        raise RecipeError(f"`reward_weights` has {len(args.reward_weights)} entries for {len(rewards)} rewards.")
    if not rewards:
        raise RecipeError("nothing to learn from: set `reward_model_path`, `reward_funcs` or `length_coef`.")
    return rewards
