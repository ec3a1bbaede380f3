"""The config dataclasses of DPO, GRPO and RLOO: TRL's own, plus what rows with images and the factual reward need."""

from dataclasses import dataclass
from typing import Any

from trl import DPOConfig

from trl_llava.configs.stages import (
    BATCH_FIELDS,
    OVERLONG_HELP,
    TEMPLATE_HELP,
    Overlong,
    option,
    refuse,
    require_positive,
)
from trl_llava.hub.names import split_fields


@dataclass
class LlavaDPOConfig(DPOConfig):
    """TRL's DPO config, for the rows that the reward model is trained on.

    Raises:
        ValueError: If a field is set that cannot work with images.
    """

    chat_template_path: str | None = option(None, TEMPLATE_HELP)
    overlong: Overlong = option("error", OVERLONG_HELP)

    def __post_init__(self) -> None:
        refuse(
            self,
            {
                "padding_free": (False, "image rows are padded and masked; flattening them would mix their positions"),
                "truncation_mode": ("keep_start", "rows are never truncated; see `overlong`"),
                "precompute_ref_log_probs": (False, "images are encoded when their batch is made"),
                "pad_token": (None, "the pad token belongs to the processor; set it there and save it"),
            },
        )
        require_positive(self, "max_length", "pad_to_multiple_of", *BATCH_FIELDS)
        super().__post_init__()  # last: it looks at the hardware


@dataclass
class OnlineArguments:
    """What GRPO and RLOO need beside TRL's configs: the rewards, and limits for prompts with images."""

    reward_model_path: str | None = option(
        None, "Stage 2: the FactualReward checkpoint (Hub ID or folder). Optional with `reward_funcs`."
    )
    reward_model_revision: str | None = option(None, "Branch, tag or commit of `reward_model_path`.")
    reward_funcs: list[str] | None = option(
        None,
        "Reward functions 'package.module:function' with TRL's signature, besides or instead of the reward model; "
        "`reward_weights` weighs the reward model first.",
    )
    length_coef: float | None = option(
        None,
        "Weight of the length term: answers of `max_completion_length` tokens get it whole, times the row's "
        "`length_multiplier` (paper: -10). The last of the rewards; None: off.",
    )
    reward_batch_size: int = option(16, "How many answers the reward model scores in one pass.")
    chat_template_path: str | None = option(None, TEMPLATE_HELP)
    max_prompt_length: int | None = option(None, "Longest prompt in tokens, image tokens included. None: no limit.")
    overlong: Overlong = option("error", OVERLONG_HELP)
    dataset_num_proc: int | None = option(None, "Processes that check the rows.")

    def __post_init__(self) -> None:
        split_fields(self, reward_model_path="reward_model_revision")
        require_positive(self, "reward_batch_size", "max_prompt_length", "dataset_num_proc")


def refuse_vllm(args: Any) -> None:
    """Raises if generation shall run in vLLM.

    Args:
        args: TRL's config of GRPO or RLOO.

    Raises:
        ValueError: If `use_vllm` is set.
    """
    reason = (
        "TRL 1.12 hands vLLM prompts with expanded image tokens, which a colocated engine expands once more "
        "(https://github.com/huggingface/trl/issues/6294); `trl-llava ppo` has `use_vllm`"
    )
    refuse(args, {"use_vllm": (False, reason)})
