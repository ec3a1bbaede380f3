"""What GRPO and RLOO do alike: all but the trainer."""

import inspect
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from transformers import ProcessorMixin, Trainer, set_seed

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.collators import PromptCollator
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.trl_rows import as_trl_reads
from trl_llava.errors import RecipeError
from trl_llava.models.model_inputs import COUNTS
from trl_llava.models.starts import load_policy_start, load_recipe_processor
from trl_llava.rewards.functions import RewardFunction, needs_captions
from trl_llava.rewards.reward_loading import load_reward_functions
from trl_llava.rewards.reward_terms import length_term
from trl_llava.run.generation_buffer import ResumableGenerations
from trl_llava.stage_run import begin


class DropsImageCounts:
    """Lets TRL's trainers read LLaVA-OneVision, whose processor counts the images of each row (`batch_num_images`).

    They do not hand the count on to the model, which then takes each image for the only one of its row. Nothing is
    lost as long as it is: of two, it would tile images that the processor did not tile.
    """

    def _get_per_token_logps_and_entropies(self, *args: Any, batch_num_images: Any = None, **kwargs: Any) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]  # TRL's trainer


def run_online(stage: str, trainer_class: type[Trainer], args: Sequence[str] | None) -> Any:
    """Runs TRL's `GRPOTrainer` or `RLOOTrainer` with the factual reward, and returns it."""
    run = begin(stage, args)
    training_args, model_args = run.training_args, run.model_args
    processor = load_recipe_processor(model_args, training_args.chat_template_path)
    one_image = _allows_one_image_only(processor, trainer_class)
    rewards = _load_rewards(training_args, model_args)
    collator = PromptCollator(processor, training_args.max_prompt_length)
    splits = run.load_rows("prompt", require_captions=needs_captions(rewards))
    train_rows, eval_rows = (
        None
        if rows is None
        else as_trl_reads(drop_overlong(rows, collator, training_args.overlong), one_image=one_image)
        for rows in splits
    )
    # An image token in a completion has no image: the next forward pass would stop at it.
    suppressed = {"suppress_tokens": [processor.image_token_id]}
    training_args.generation_kwargs = {**(training_args.generation_kwargs or {}), **suppressed}
    set_seed(training_args.seed)  # TRL seeds only after it has drawn the weights of a fresh adapter
    model, peft_config = load_policy_start(model_args)
    mixins = (ResumableGenerations, DropsImageCounts) if one_image else (ResumableGenerations,)
    trainer = type(trainer_class.__name__, (*mixins, trainer_class), {})(
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
    unknown = sorted(set(processor.image_processor.model_input_names) - set(handed_on))
    if unknown and unknown != [COUNTS]:
        raise RecipeError(
            f"TRL's {trainer_class.__name__} does not know {', '.join(unknown)}, which {type(processor).__name__} "
            "makes: choose a LLaVA-1.5 or LLaVA-NeXT model, or train this one with `trl-llava ppo` or `dpo`."
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
    if not rewards:
        raise RecipeError("nothing to learn from: set `reward_model_path`, `reward_funcs` or `length_coef`.")
    return rewards
