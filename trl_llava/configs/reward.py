"""The config of stage 2."""

from dataclasses import dataclass
from typing import Any, Literal

from trl import RewardConfig

from trl_llava.configs.stages import (
    BATCH_FIELDS,
    OVERLONG_HELP,
    ROWS_ARE_OURS,
    TEMPLATE_HELP,
    Overlong,
    keep_heads,
    option,
    refuse,
    require_positive,
)
from trl_llava.prompts import JudgingPrompt


@dataclass
class LlavaRewardConfig(RewardConfig):
    """TRL's reward config, plus the judging turn that the reward model reads.

    Raises:
        ValueError: If a field is set that cannot work with images, or two fields contradict each other.

    Example:
        >>> args = LlavaRewardConfig("reward", judging_prompt={"answer_prefix": "The score is"})
        >>> args.make_judging_prompt().with_captions
        True
    """

    # JSON text on the command line becomes a mapping, as for TRL's own fields of this kind.
    _VALID_DICT_FIELDS = [*RewardConfig._VALID_DICT_FIELDS, "judging_prompt"]  # noqa: RUF012

    chat_template_path: str | None = option(None, TEMPLATE_HELP)
    with_captions: bool = option(True, "Show the captions of the image to the reward model in the judging turn.")
    caption_seed: int = option(
        0, "Seed of the order of the captions, which is the same for both completions of a pair."
    )
    judging_prompt: dict[str, Any] | str | None = option(
        None,
        "Texts of the judging turn: a mapping with any of instruction, answer_prefix, factual_header, caption_line. "
        "Those left out, or None for all, are the paper's.",
    )
    overlong: Overlong = option("error", OVERLONG_HELP)
    share_prefix: bool = option(
        True,
        "Run what both completions of a pair share (image and prompt) once. Where the model's attention takes "
        "no mask of packed rows (all but sdpa, eager and flex), both run whole, which is logged.",
    )
    reward_centering: Literal["trl", "paper", "none"] = option(
        "trl",
        "'trl': center_rewards_coefficient * mean((r1 + r0)^2), off while that is None. 'paper': "
        "center_rewards_coefficient * |mean(r1 + r0)|, the coefficient being 0.001 while it is None. 'none': off.",
    )

    def __post_init__(self) -> None:
        refuse(self, ROWS_ARE_OURS)
        require_positive(self, "max_length", "pad_to_multiple_of", *BATCH_FIELDS)
        keep_heads(self)
        if self.reward_centering == "none" and self.center_rewards_coefficient is not None:
            raise ValueError(
                f"`center_rewards_coefficient={self.center_rewards_coefficient}` contradicts reward_centering='none'; "
                "leave the coefficient out, or set `reward_centering` to 'trl' or 'paper'."
            )
        super().__post_init__()  # it looks at the hardware, and reads `judging_prompt` from JSON
        self.make_judging_prompt()

    def make_judging_prompt(self) -> JudgingPrompt:
        """The prompt of `judging_prompt`, `with_captions` and `caption_seed`; texts left out are the paper's."""
        texts = self.judging_prompt or {}
        if not isinstance(texts, dict):
            raise ValueError(f"`judging_prompt` must be a mapping of texts, found {texts!r}.")
        for name, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(
                    f"`judging_prompt`: `{name}` is {text!r}, expected a text. Captions are switched by "
                    "`with_captions` and shuffled by `caption_seed`."
                )
        try:
            return JudgingPrompt.from_dict({**texts, "with_captions": self.with_captions, "seed": self.caption_seed})
        except ValueError as error:
            raise ValueError(f"`judging_prompt`: {error}") from error
