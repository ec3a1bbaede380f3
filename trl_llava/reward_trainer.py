"""Stage 2: a reward model on image, prompt, completion and the captions of the image."""

import copy
import logging
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import RewardConfig, RewardTrainer

from trl_llava.configs.reward import LlavaRewardConfig
from trl_llava.configs.stages import as_own
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.load import rows_from
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.health import FiniteSteps
from trl_llava.models.base_model import base_of
from trl_llava.models.blank_image import encode_on_every_process
from trl_llava.models.gpu_kernels import check_liger_knows
from trl_llava.models.longest_row import positions_of
from trl_llava.models.own_processor import own_processor
from trl_llava.models.sequence_classification import ImageTextForSequenceClassification
from trl_llava.models.sharded_weights import shard_by_layers
from trl_llava.models.shared_prefix import why_not
from trl_llava.prompts import JudgingPrompt
from trl_llava.publish.trainer import PushesSafely
from trl_llava.rewards.reward_settings import save_settings
from trl_llava.run.safe_checkpoints import SafeCheckpoints

logger = logging.getLogger(__name__)

EvalDataset: TypeAlias = Dataset | dict[str, Dataset] | None
PAPER_CENTERING = 1e-3


class LlavaRewardTrainer(FiniteSteps, SafeCheckpoints, PushesSafely, RewardTrainer):
    """TRL's `RewardTrainer` on pairs of completions to a prompt with images.

    Differs from TRL's in its collator, which renders the judging turn and runs image and prompt once per pair, in the
    paper's regulariser (`args.reward_centering: paper`), and in that each pair of a step weighs the same. A loss or
    gradient that is not finite stops the run.

    Args:
        model: a `...ForSequenceClassification` with one label, or Hub ID or folder of a model.
        args: the config, or TRL's plain one.
        train_dataset: rows in a format of docs/data.md.
        processing_class: the processor, by default the model's own; a tokenizer does where no row has an image.
        eval_dataset: rows of the same kind, or a dict of such data sets.
        judging_prompt: the turn behind the completion that asks for a score; `None` scores where the completion ends.
            "auto" is what `args` says; with TRL's plain config the paper's, with captions if a row has any.
        captions_column: column with the captions of a row, as for `load_rows`.
        rating: which rating makes a pair of several completions, as for `load_rows`.
        **kwargs: all else that `RewardTrainer` takes (`peft_config`, `callbacks`, `quantization_config`, ...).

    Raises:
        RowError: if a row cannot be used, or has no captions although the judging turn shows captions.

    Example:
        >>> from datasets import load_dataset
        >>> from peft import LoraConfig
        >>> from trl import RewardConfig
        >>> trainer = LlavaRewardTrainer(
        ...     model="llava-hf/llava-1.5-7b-hf",
        ...     args=RewardConfig("reward", num_train_epochs=1, max_length=2048),
        ...     train_dataset=load_dataset("openbmb/RLAIF-V-Dataset", split="train"),
        ...     peft_config=LoraConfig(target_modules=r".*language_model.*_proj", modules_to_save=["score"]),
        ... )
        >>> result = trainer.train()
        >>> trainer.save_model()  # for `FactualReward.from_pretrained`
    """

    stage = "reward"

    _mean_rows: float | None = None  # of the micro-batches of a step; None outside of one

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        eval_dataset: EvalDataset = None,
        judging_prompt: JudgingPrompt | Literal["auto"] | None = "auto",
        captions_column: str = "captions",
        rating: str | None = None,
        **kwargs: Any,
    ) -> None:
        plain = not isinstance(args, LlavaRewardConfig)
        args = copy.copy(as_own(args, LlavaRewardConfig))
        if processing_class is None:
            processing_class = own_processor(model, args)
            args.chat_template_path = None  # the processor has it

        def rows(dataset: Dataset, name: str) -> Dataset:
            return rows_from(dataset, "preference", name=name, captions_column=captions_column, rating=rating)

        train_dataset = rows(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: rows(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = rows(eval_dataset, "eval")
        if isinstance(judging_prompt, str):
            said: JudgingPrompt = args.make_judging_prompt()
            judging_prompt = replace(said, with_captions=any(train_dataset["captions"])) if plain else said
        self.judging_prompt: JudgingPrompt | None = judging_prompt
        # TRL prepares the data sets from within its `__init__`, so the collator has to be there before.
        self._positions = positions_of(model, revision=(args.model_init_kwargs or {}).get("revision"))
        self.preference_collator = kwargs.pop("data_collator", None) or PreferenceCollator(
            processing_class,
            max_length=args.max_length,
            judging_prompt=judging_prompt,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.preference_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,  # TRL looks for the pad token here
            **kwargs,
        )
        check_liger_knows(self.model, args)
        if isinstance(self.preference_collator, PreferenceCollator):
            reason = self._why_pairs_run_apart()
            self.preference_collator.share_prefix = reason is None
            if reason is not None:
                logger.warning("Image and prompt run once for each completion of a pair, not once a pair: %s.", reason)
        if args.chat_template_path is not None:
            processing_class.chat_template = tokenizer.chat_template
        self.processing_class = self.callback_handler.processing_class = processing_class
        encode_on_every_process(self.model, processing_class, self.accelerator)
        shard_by_layers(self.model, self.accelerator)

    def _why_pairs_run_apart(self) -> str | None:
        base = base_of(self.model)
        if not self.args.share_prefix:
            return "`share_prefix` is false"
        if not isinstance(base, ImageTextForSequenceClassification):
            return f"{type(base).__name__} takes no packed rows"
        return why_not(base)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: LlavaRewardConfig, dataset_name: str
    ) -> Dataset:
        # TRL would tokenise the pairs here, without their images.
        shows_captions = self.judging_prompt is not None and self.judging_prompt.with_captions
        rows = rows_from(dataset, "preference", name=dataset_name, require_captions=shows_captions)
        return drop_overlong(rows, self.preference_collator, args.overlong, positions=self._positions)

    def _set_signature_columns_if_needed(self) -> None:
        # `None` until transformers asks for the first time.
        if getattr(self, "_signature_columns", None) is None:
            self._signature_columns = ["row_name", "images", "prompt", "chosen", "rejected", "captions", "margin"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Every checkpoint can be scored with, and none with another prompt than its own.
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # transformers calls this on every process
            save_settings(output_dir or self.args.output_dir, self.judging_prompt, self.model)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The pairwise loss, plus the centring that `args.reward_centering` names.

        "trl" is TRL's `c * mean((r1 + r0)^2)`; "paper" is `c * |mean(r1 + r0)|` with c = 0.001 by default. Each pair
        of a step weighs the same, also where its last micro-batch has fewer of them.
        """
        mean_rows = self._mean_rows if self.model.training else None
        share = 1.0 if mean_rows is None else len(inputs["input_ids"]) / mean_rows
        loss, outputs = self._micro_batch_loss(model, inputs, num_items_in_batch)
        return (loss * share, outputs) if return_outputs else loss * share

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of a step, whose mean number of rows is kept: upstream gives each the same weight."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._mean_rows = sum(len(batch["input_ids"]) for batch in batches) / max(len(batches), 1)
        return batches, items

    def _micro_batch_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], items: Any
    ) -> tuple[torch.Tensor, Any]:
        if self.args.reward_centering != "paper":
            return super().compute_loss(model, inputs, True, items)
        coefficient = self.args.center_rewards_coefficient
        self.args.center_rewards_coefficient = None  # TRL would add its own term
        try:
            loss, outputs = super().compute_loss(model, inputs, True, items)
        finally:
            self.args.center_rewards_coefficient = coefficient
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        # |mean| of all processes' pairs, as a share whose mean over processes it is.
        mean = (chosen + rejected).mean()
        sign = self.accelerator.reduce(mean.detach(), reduction="mean").sign()
        return loss + (PAPER_CENTERING if coefficient is None else coefficient) * sign * mean, outputs
