"""Stage 1: supervised fine-tuning on conversations about images."""

import copy
from typing import Any, TypeAlias

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from trl import SFTConfig, SFTTrainer

from trl_llava.configs.sft import LlavaSFTConfig
from trl_llava.data.collators import SFTCollator
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.load import rows_from
from trl_llava.health import FiniteSteps
from trl_llava.models.blank_image import encode_on_every_process
from trl_llava.models.gpu_kernels import check_liger_knows
from trl_llava.models.longest_row import positions_of
from trl_llava.models.own_processor import own_processor
from trl_llava.models.sharded_weights import shard_by_layers
from trl_llava.publish.trainer import PushesSafely
from trl_llava.run.safe_checkpoints import SafeCheckpoints

EvalDataset: TypeAlias = Dataset | dict[str, Dataset] | None


class LlavaSFTTrainer(FiniteSteps, SafeCheckpoints, PushesSafely, SFTTrainer):
    """TRL's `SFTTrainer` with labels on the assistant's turns only, of conversations with images.

    Differs from TRL's in its collator and in what it does to the data sets: rows are checked and named, image tokens
    are never cut, and a row longer than `args.max_length` is an error or dropped and counted (`args.overlong`). A loss
    or gradient that is not finite stops the run.

    Args:
        model: model, or Hub ID or folder of one.
        args: the config, or TRL's plain one (`LlavaSFTConfig.of`).
        train_dataset: rows in a format of docs/data.md.
        processing_class: the processor; by default the model's own.
        eval_dataset: rows of the same kind, or a dict of such data sets.
        rating: which rating chooses the completion of a row that has several, as for `load_rows`.
        **kwargs: all else that `SFTTrainer` takes (`peft_config`, `callbacks`, `quantization_config`, ...).

    Example:
        >>> from datasets import load_dataset
        >>> from peft import LoraConfig
        >>> from trl import SFTConfig
        >>> trainer = LlavaSFTTrainer(
        ...     model="llava-hf/llava-1.5-7b-hf",
        ...     args=SFTConfig("sft", num_train_epochs=1, max_length=2048),
        ...     train_dataset=load_dataset("openbmb/RLAIF-V-Dataset", split="train"),
        ...     peft_config=LoraConfig(target_modules=r".*language_model.*_proj"),
        ... )
        >>> result = trainer.train()
        >>> trainer.save_model()
    """

    stage = "sft"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | None = None,
        eval_dataset: EvalDataset = None,
        rating: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(LlavaSFTConfig.of(args))
        if processing_class is None:
            processing_class = own_processor(model, args)
            args.chat_template_path = None  # the processor has it
        # TRL seeds only after it has drawn the weights of a fresh adapter.
        set_seed(args.seed)
        collator = kwargs.pop("data_collator", None) or SFTCollator(
            processing_class,
            max_length=args.max_length,
            labels_on=args.labels_on,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        # The one option that TRL refuses with images; our collator already does it.
        upstream_args = copy.copy(args)
        upstream_args.assistant_only_loss = False

        positions = positions_of(model, revision=(args.model_init_kwargs or {}).get("revision"))

        def prepare(dataset: Dataset, name: str) -> Dataset:
            rows = rows_from(dataset, "sft", name=name, rating=rating)
            return drop_overlong(rows, collator, args.overlong, positions=positions)

        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(dataset, f"eval_dataset[{name}]") for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "eval_dataset")
        super().__init__(
            model=model,
            args=upstream_args,
            data_collator=collator,
            train_dataset=prepare(train_dataset, "train_dataset"),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        check_liger_knows(self.model, args)
        encode_on_every_process(self.model, processing_class, self.accelerator)
        shard_by_layers(self.model, self.accelerator)

    def _set_signature_columns_if_needed(self) -> None:
        # `None` until transformers asks for the first time.
        if getattr(self, "_signature_columns", None) is None:
            self._signature_columns = ["row_name", "images", "prompt", "completion"]
