"""What GRPO and RLOO need beside the fields of TRL's configs: rewards, alarms, and limits for prompts with images."""

from dataclasses import dataclass

from trl_llava.configs.alarms import AlarmOptions, check_alarms
from trl_llava.configs.stages import OVERLONG_HELP, TEMPLATE_HELP, Overlong, option, refuse, require_positive
from trl_llava.hub.names import split_fields


@dataclass
class OnlineArguments(AlarmOptions):
    """Mixed into TRL's GRPOConfig or RLOOConfig, before it.

    Raises:
        ValueError: If a field is set that cannot work with images.
    """

    reward_model_path: str | None = option(
        None, "Stage 2: the FactualReward checkpoint (Hub ID or folder). Optional with `reward_funcs`."
    )
    reward_model_revision: str | None = option(None, "Branch, tag or commit of `reward_model_path`.")
    reward_funcs: list[str] | None = option(
        None,
        "Reward functions with TRL's signature, 'package.module:function' or 'file.py:function' (a path from the "
        "current directory), besides or instead of the reward model; "
        "`reward_weights` weighs the reward model first.",
    )
    length_coef: float | None = option(
        None,
        "Weight of the length term: completions of `max_completion_length` tokens get it whole, times the row's "
        "`length_multiplier` (paper: -10). The last of the rewards; None: off.",
    )
    reward_batch_size: int = option(16, "How many completions the reward model scores in one pass.")
    chat_template_path: str | None = option(None, TEMPLATE_HELP)
    max_prompt_length: int | None = option(None, "Longest prompt in tokens, image tokens included. None: no limit.")
    overlong: Overlong = option("error", OVERLONG_HELP)
    dataset_num_proc: int | None = option(None, "Processes that check the rows.")

    def __post_init__(self) -> None:
        reason = (
            "TRL 1.16 with vLLM 0.31 sends the tower's weights under names that vLLM refuses, has a colocated engine "
            "expand image tokens a second time (https://github.com/huggingface/trl/issues/6294), and leaves a server "
            "with images encoded before the update; `trl-llava ppo` has `use_vllm`"
        )
        refuse(self, {"use_vllm": (False, reason)})
        for name in ("use_transformers_paged", "use_transformers_continuous_batching"):
            if getattr(self, name, False):
                raise ValueError(f"`{name}` must stay False: it generates without images.")
        split_fields(self, reward_model_path="reward_model_revision")
        require_positive(self, "reward_batch_size", "max_prompt_length", "dataset_num_proc")
        check_alarms(self)
        super().__post_init__()  # type: ignore[misc]  # that of TRL's config; last: it looks at the hardware
