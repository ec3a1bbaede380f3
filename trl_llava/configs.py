"""The dataclasses behind every recipe key: TRL's own, plus our fields and all checks that need more than one field.

Fields that TRL already has keep TRL's names and defaults. A TRL field that cannot work with images is refused here
with the reason, never ignored.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import ModelConfig, RewardConfig, ScriptArguments, SFTConfig

with warnings.catch_warnings():
    # The only release line that has PPO keeps it under `experimental`; pyproject.toml bounds it: the notice is noise.
    warnings.filterwarnings("ignore", message=".*trl.experimental.*")
    from trl.experimental.ppo import PPOConfig

# TRL's own use of names that transformers has renamed; nothing a user could change in a recipe silences it.
warnings.filterwarnings(
    "ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated", category=FutureWarning
)

Overlong = Literal["error", "drop"]
OVERLONG_HELP = (
    "What to do with a row that is longer than the limit: 'error' names it and stops, 'drop' leaves it out and counts "
    "it. Rows are never cut, because a cut through an image's tokens changes the image."
)
TEMPLATE_HELP = (
    "Chat template instead of the saved one, saved with the processor: 'vicuna_v1' (LLaVA-1.5's, with an </s> after "
    "each answer), a .jinja file, or Hub ID or folder of a model."
)


def option(default: Any, text: str) -> Any:
    """A dataclass field that a recipe can set.

    Args:
        default: Its default.
        text: What `--help` says about it.

    Returns:
        The field; typed `Any` so that the annotation of the field holds.
    """
    return field(default=default, metadata={"help": text})


def refuse(config: Any, neutral: dict[str, tuple[Any, str]]) -> None:
    """Raises for the first field that is not at the only value that works.

    Args:
        config: A config object.
        neutral: Field name -> (the only value that works, why).

    Raises:
        ValueError: If a field has another value.
    """
    for name, (value, reason) in neutral.items():
        found = getattr(config, name)
        if found != value:
            raise ValueError(f"`{name}` must stay {value!r} (found {found!r}): {reason}.")


def require_positive(config: Any, *names: str) -> None:
    """Raises for the first of these fields that is set and not above zero.

    Args:
        config: A config object.
        *names: Names of number fields; `None` values pass.

    Raises:
        ValueError: If a field is zero or negative.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be above 0, found {value!r}.")


_ROWS_ARE_OURS = {
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

    image_folder: str | None = option(None, "Folder that the image names in the rows are relative to.")
    captions_file: str | None = option(
        None, "JSON file {image name: [captions]} whose captions are joined to the rows by image name."
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "A row that cannot be used: 'error' names it and stops, 'skip' drops and counts it."
    )

    def __post_init__(self) -> None:
        refuse(
            self,
            {
                "dataset_streaming": (False, "all rows are checked before training starts"),
                "ignore_bias_buffers": (False, "LLaVA models have no such buffers; the flag would do nothing"),
            },
        )


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
    trust_remote_code: bool = field(default=False, init=False)


@dataclass
class LlavaSFTConfig(SFTConfig):
    """TRL's SFT config with labels on the answers of all turns by default.

    Raises:
        ValueError: If a field is set that cannot work with images.
    """

    assistant_only_loss: bool = option(
        True,
        "Compute the loss on the assistant's answers of all turns and their end-of-turn tokens. If False, "
        "`completion_only_loss` decides: the last answer (True or None) or the whole text (False).",
    )
    chat_template_path: str | None = option(None, TEMPLATE_HELP)
    overlong: Overlong = option("error", OVERLONG_HELP)

    def __post_init__(self) -> None:
        whole = "a row with an image is one sequence that is never cut or joined to another"
        refuse(
            self,
            {
                "packing": (False, whole),
                "eval_packing": (None, whole),
                "padding_free": (False, "image rows are padded and masked; flattening them would mix their positions"),
                "truncation_mode": ("keep_start", "rows are never truncated; see `overlong`"),
                "dataset_text_field": ("text", "rows are conversations; README.md names the columns"),
                "dataset_kwargs": (None, "rows are always checked, and already prepared rows pass unchanged"),
                **_ROWS_ARE_OURS,
            },
        )
        require_positive(self, "max_length", "pad_to_multiple_of")
        super().__post_init__()  # last: it looks at the hardware

    @property
    def labels_on(self) -> Literal["answers", "completion", "all"]:
        """Which tokens carry labels, as `SFTCollator` calls them.

        `assistant_only_loss` and `completion_only_loss` together mean the answers inside the completion, and the
        completion is one answer.

        Returns:
            "answers" (all turns), "completion" (the last answer) or "all".
        """
        if self.assistant_only_loss and not self.completion_only_loss:
            return "answers"
        return "all" if self.completion_only_loss is False else "completion"


@dataclass
class LlavaRewardConfig(RewardConfig):
    """TRL's reward config, plus the judging turn that the reward model reads.

    Raises:
        ValueError: If a field is set that cannot work with images, or two fields contradict each other.
    """

    # JSON text on the command line becomes a mapping, as for TRL's own fields of this kind.
    _VALID_DICT_FIELDS = [*RewardConfig._VALID_DICT_FIELDS, "judging_prompt"]  # noqa: RUF012

    chat_template_path: str | None = option(None, TEMPLATE_HELP)
    with_captions: bool = option(True, "Show the captions of the image to the reward model in the judging turn.")
    caption_seed: int = option(0, "Seed of the order of the captions, which is the same for both answers of a pair.")
    judging_prompt: dict[str, Any] | str | None = option(
        None,
        "Texts of the judging turn: a mapping with any of instruction, answer_prefix, factual_header, caption_line. "
        "Those left out, or None for all, are the paper's.",
    )
    overlong: Overlong = option("error", OVERLONG_HELP)
    reward_centering: Literal["trl", "paper", "none"] = option(
        "trl",
        "'trl': center_rewards_coefficient * mean((r1 + r0)^2), off while that is None. 'paper': "
        "center_rewards_coefficient * |mean(r1 + r0)|, the coefficient being 0.001 while it is None. 'none': off.",
    )

    def __post_init__(self) -> None:
        refuse(self, _ROWS_ARE_OURS)
        require_positive(self, "max_length", "pad_to_multiple_of")
        if self.reward_centering == "none" and self.center_rewards_coefficient is not None:
            raise ValueError(
                f"`center_rewards_coefficient={self.center_rewards_coefficient}` contradicts reward_centering='none'; "
                "leave the coefficient out, or set `reward_centering` to 'trl' or 'paper'."
            )
        super().__post_init__()  # last: it looks at the hardware


@dataclass
class LlavaPPOConfig(PPOConfig):
    """TRL's PPO config, plus prompts with images, the factual reward's terms and the first-step health check.

    With our fields at their defaults and text-only rows, training is TRL's.

    Raises:
        ValueError: If a field is set that cannot work, or two fields contradict each other.
    """

    trust_remote_code: bool = option(False, "Allow models and processors that ship their own Python code.")
    # What is loaded
    sft_model_path: str | None = option(
        None, "Stage 1: the adapter, or full model, that the policy starts from (Hub ID or folder)."
    )
    sft_model_revision: str | None = option(None, "Branch, tag or commit of `sft_model_path`.")
    reward_model_path: str | None = option(
        None, "Stage 2: the FactualReward checkpoint (Hub ID or folder). Optional with `reward_funcs`."
    )
    reward_model_revision: str | None = option(None, "Branch, tag or commit of `reward_model_path`.")
    value_model_path: str | None = option(None, "Checkpoint the value model starts from. None: as `value_init` says.")
    value_init: Literal["reward", "policy"] = option(
        "reward", "Backbone that the value model starts from; its head always starts at zero."
    )
    # Prompts
    chat_template_path: str | None = option(None, f"{TEMPLATE_HELP} The reward model keeps its own.")
    max_prompt_length: int | None = option(None, "Longest prompt in tokens, image tokens included. None: no limit.")
    overlong: Overlong = option("error", OVERLONG_HELP)
    # The score of a response
    reward_funcs: list[str] | None = option(
        None,
        "Reward functions 'package.module:function' with TRL's signature, besides or instead of the reward model.",
    )
    reward_weights: list[float] | None = option(
        None, "Weight of each reward: the reward model (if any), then `reward_funcs`. None: 1."
    )
    correctness_coef: float | None = option(None, "Weight of the correctness term (paper: 2). None: off.")
    yes_no: Literal["no_only", "both"] = option(
        "no_only", "Correctness of yes/no questions: the paper's bonus for 'No' only, or the same for 'Yes'."
    )
    length_coef: float | None = option(None, "Weight of length / response_length (paper: -10). None: off.")
    missing_eos_replaces: bool = option(
        False, "A response without a stop token gets -`missing_eos_penalty` instead of its rewards, not besides them."
    )
    reward_bias: float = option(0.0, "Added to every score.")
    normalize_scores: Literal["first_batch"] | None = option(
        None, "'first_batch': shift and scale the rewards by mean and spread of the first batch."
    )
    # The loss
    clamp_kl: bool = option(False, "Clamp the per-token KL at 0 from below (paper: True).")
    reward_scale: float = option(1.0, "Factor on the per-token rewards unless they are whitened (paper: 10).")
    whiten_variance: Literal["sample", "population"] = option(
        "sample",
        "Whitening divides by the number of tokens minus 1 ('sample') or by their number (paper: 'population').",
    )
    # Health
    check_first_step: bool = option(
        True, "Stop with an explanation if the first step's KL is not 0 or its ratio not 1."
    )
    first_step_kl_tolerance: float = option(1e-3, "Largest |KL| per response that the first step may show.")
    first_step_ratio_tolerance: float | None = option(
        None, "Largest mean |ratio - 1| that the first step may show. None: 0.001, or 0.05 where it runs in 16 bit."
    )

    def __post_init__(self) -> None:
        computed = "the trainer computes it from the batch size per device, accumulation and the number of processes"
        sizes = ("world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size")
        refuse(self, dict.fromkeys((*sizes, "local_mini_batch_size", "mini_batch_size"), (None, computed)))
        refuse(
            self,
            {
                "train_sampling_strategy": _ROWS_ARE_OURS["train_sampling_strategy"],
                "eval_strategy": ("no", "PPO has no evaluation loss; `test_split_size` rows fill its tables"),
                "fp16": (False, "ratios and KL need bf16's range, and loss scaling skips the first steps"),
            },
        )
        if self.save_strategy not in ("no", "steps"):
            raise ValueError(
                f"`save_strategy` must be 'no' or 'steps' (found {self.save_strategy!r}): PPO has no epochs."
            )
        if self.model_adapter_name not in (None, "default"):
            raise ValueError(
                f"`model_adapter_name` must stay 'default' (found {self.model_adapter_name!r}): that is the adapter "
                "which is trained and saved."
            )
        require_positive(self, "num_mini_batches", "num_ppo_epochs", "total_episodes", "response_length")
        require_positive(self, "local_rollout_forward_batch_size", "max_prompt_length", "temperature")
        require_positive(self, "missing_eos_penalty", "reward_scale")
        self._check_batches()
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("`stop_token` and `stop_token_id` exclude each other: leave one of them out.")
        if self.missing_eos_penalty is not None and self.stop_token is None and self.stop_token_id is None:
            raise ValueError(
                f"`missing_eos_penalty={self.missing_eos_penalty}` needs a stop token, or it hits all responses: "
                "set `stop_token: eos`, or `stop_token_id`."
            )
        super().__post_init__()  # last: it looks at the hardware

    def _check_batches(self) -> None:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        product = (
            f"`per_device_train_batch_size` ({self.per_device_train_batch_size}) * `gradient_accumulation_steps` "
            f"({self.gradient_accumulation_steps}) = {rows} rollouts per process"
        )
        if rows % self.num_mini_batches:
            raise ValueError(
                f"`num_mini_batches` ({self.num_mini_batches}) must divide {product}: change one of the three."
            )
        if self.whiten_rewards and rows // self.num_mini_batches < 8:
            raise ValueError(
                f"`whiten_rewards` needs at least 8 rollouts per process in a mini-batch: {product} in "
                f"`num_mini_batches` ({self.num_mini_batches}) leaves {rows // self.num_mini_batches}."
            )
