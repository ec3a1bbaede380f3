"""What the configs of all stages share: the arguments of data and model, and how a field is declared and checked.

Each config is TRL's own, plus our fields. Fields that TRL already has keep TRL's names and defaults. A TRL field that
cannot work with images is refused with the reason, never ignored.
"""

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from trl_llava.hub.names import split_fields

# TRL's configs and PEFT use names that transformers 5.24 has renamed; nothing in a recipe would silence it.
warnings.filterwarnings(
    "ignore", message="`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated", category=FutureWarning
)

Overlong = Literal["error", "drop"]
BATCH_FIELDS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
OVERLONG_HELP = (
    "What to do with a row that is longer than the limit: 'error' names it and stops, 'drop' leaves it out and counts "
    "it. Rows are never cut, because a cut through an image's tokens changes the image."
)
TEMPLATE_HELP = (
    "Chat template instead of the saved one, saved with the processor: 'vicuna_v1' (LLaVA-1.5's, with an </s> after "
    "each assistant message), a .jinja file, or Hub ID or folder of a model."
)


Config = TypeVar("Config", bound=TrainingArguments)


def as_own(args: TrainingArguments, config: type[Config], **changes: Any) -> Config:
    """TRL's plain config as ours that extends it, whose own fields keep their defaults, with `changes`."""
    if isinstance(args, config):
        return args
    return config(**{each.name: getattr(args, each.name) for each in fields(args) if each.init} | changes)


def option(default: Any, text: str) -> Any:
    """A dataclass field with its text for `--help`; typed `Any`, so that the annotation of the field holds."""
    return field(default=default, metadata={"help": text})


def refuse(config: Any, neutral: dict[str, tuple[Any, str]]) -> None:
    """Raises for the first field that is not at the only value that works; `neutral` is field -> (that value, why)."""
    for name, (value, reason) in neutral.items():
        found = getattr(config, name)
        if found != value:
            raise ValueError(f"`{name}` must stay {value!r} (found {found!r}): {reason}.")


def require_positive(config: Any, *names: str) -> None:
    """Raises for the first of these fields that is a number and not above zero; None and 'auto' pass."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and not value > 0:  # nan is not
            raise ValueError(f"`{name}` must be above 0, found {value!r}.")


def keep_heads(config: Any) -> None:
    """Keeps liger's kernels out of a model's head and loss, which a stage computes itself."""
    if not config.use_liger_kernel:
        return
    kernels = config.liger_kernel_config or {}
    for name in ("fused_linear_cross_entropy", "cross_entropy"):
        if kernels.get(name):
            raise ValueError(
                f"`liger_kernel_config: {{{name}: true}}` replaces the model's head or loss, which this stage "
                "computes itself: leave it out."
            )
        kernels = {**kernels, name: False}
    config.liger_kernel_config = kernels


ROWS_ARE_OURS = {
    "pad_token": (None, "the pad token belongs to the processor; set `processor.tokenizer.pad_token` and save it"),
    "train_sampling_strategy": (
        "random",
        "lengths are known only after a row's image has been decoded, which happens when its batch is made",
    ),
}


@dataclass
class LlavaScriptArguments(ScriptArguments):
    """TRL's script arguments, plus where images and captions are and what to do with a row that cannot be used.

    Raises:
        ValueError: If a field is set that cannot work with checked rows.
    """

    image_folder: str | None = option(
        None,
        "Folder that the image names in the rows are relative to. None (`--image_folder null` unsets a recipe's): the "
        "folder of their .json or .jsonl file.",
    )
    captions_file: str | None = option(
        None, "JSON file {image name: [captions]} whose captions are joined to the rows by image name."
    )
    captions_column: str = option(
        "captions",
        "Column with the captions of a row, a text or a list of texts: captions, OCR, object lists or any facts that "
        "the reward model is to read.",
    )
    rating: str | None = option(
        None,
        "Where a row has several rated completions, the rating whose best and worst make a pair; pairs on a level are "
        "left out and counted. None: 'Visual Faithfulness' for VLFeedback, 'final_ranking' for MM-RLHF.",
    )
    fetch_images: bool = option(
        False,
        "Fetch images that rows name by URL, once, when the rows are checked; `dataset_num_proc` processes do it side "
        "by side. Otherwise such rows are refused.",
    )
    max_image_pixels: int = option(
        89_478_485, "An image of more pixels is a row that cannot be used: it may be a decompression bomb."
    )
    follow_image_links: bool = option(
        False, "Allow symbolic links that lead out of `image_folder`; a link in data from elsewhere may lead anywhere."
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "A row that cannot be used: 'error' names it and stops, 'skip' drops and counts it."
    )
    on_damaged_checkpoint: Literal["error", "previous"] = option(
        "error",
        "When a file of the last checkpoint is missing, cut short or changed at a resume: 'error' names it and stops, "
        "because a kill leaves no such checkpoint, so the disk needs a check; 'previous' says so and resumes from the "
        "last undamaged one before it.",
    )

    hub_onto_existing: bool = option(
        False,
        "With `push_to_hub`: push onto a repository that holds another run, or something else, as a new commit. By "
        "default such a repository is refused before training.",
    )

    card_samples: int = option(
        4,
        "With `push_to_hub`: how many held-out (else training) rows the model card shows, with their images. 0 "
        "shows none of the data.",
    )

    def __post_init__(self) -> None:
        refuse(
            self,
            {
                "dataset_streaming": (False, "all rows are checked before training starts"),
                "ignore_bias_buffers": (False, "LLaVA models have no such buffers; the flag would do nothing"),
            },
        )
        require_positive(self, "max_image_pixels")


@dataclass
class LlavaModelConfig(ModelConfig):
    """TRL's model config, plus the adapter to start from and what happens to the vision side.

    `trust_remote_code` is not a recipe key of this class: TRL has it in the trainer configs, and the entry points copy
    it from there.
    """

    adapter_name_or_path: str | None = option(
        None, "LoRA adapter (Hub ID or folder) to continue training, instead of a fresh one."
    )
    adapter_revision: str | None = option(None, "Branch, tag or commit of `adapter_name_or_path`.")
    freeze_vision_tower: bool = option(True, "Keep the vision tower's weights as they are.")
    freeze_projector: bool = option(True, "Keep the projector between vision tower and language model as it is.")
    pad_to_square: bool | None = option(
        None,
        "Pad images to a square in the image processor's mean colour before resizing, as the paper does. "
        "None leaves the image processor as it was saved.",
    )
    cudnn_attention: bool = option(
        False,
        "Let PyTorch give sdpa attention with a mask to cuDNN where it wants to (Hopper, Blackwell): there it plans "
        "for about a second at every batch length that it has not seen.",
    )
    trust_remote_code: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        refuse(self, {"lora_task_type": ("CAUSAL_LM", "the stage decides it")})
        split_fields(self, model_name_or_path="model_revision", adapter_name_or_path="adapter_revision")
        require_positive(self, "lora_r")
        super().__post_init__()
