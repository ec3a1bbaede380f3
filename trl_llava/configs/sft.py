"""The config of stage 1."""

from dataclasses import dataclass
from typing import Literal

from trl import SFTConfig

from trl_llava.configs.stages import (
    BATCH_FIELDS,
    OVERLONG_HELP,
    ROWS_ARE_OURS,
    TEMPLATE_HELP,
    Overlong,
    as_own,
    option,
    refuse,
    require_positive,
)


@dataclass
class LlavaSFTConfig(SFTConfig):
    """TRL's SFT config, with labels on all assistant messages by default.

    Raises:
        ValueError: If a field is set that cannot work with images.

    Example:
        >>> LlavaSFTConfig("sft", max_length=2048, overlong="drop").labels_on
        'answers'
    """

    assistant_only_loss: bool = option(
        True,
        "Compute the loss on all assistant messages and their end-of-turn tokens. If False, `completion_only_loss` "
        "decides: the last one (True or None) or the whole text (False).",
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
                **ROWS_ARE_OURS,
            },
        )
        require_positive(self, "max_length", "pad_to_multiple_of", *BATCH_FIELDS)
        super().__post_init__()  # last: it looks at the hardware

    @classmethod
    def of(cls, args: SFTConfig) -> "LlavaSFTConfig":
        """TRL's plain config as this one, with labels on all assistant messages unless `completion_only_loss` is set.

        Its `assistant_only_loss` is False by default, which cannot be told from a choice.
        """
        return as_own(args, cls, assistant_only_loss=args.assistant_only_loss or args.completion_only_loss is None)

    @property
    def labels_on(self) -> Literal["answers", "completion", "all"]:
        """Which tokens carry labels: "answers" (all assistant messages), "completion" (the last one) or "all".

        `assistant_only_loss` and `completion_only_loss` together mean the assistant messages inside the completion,
        which is one.
        """
        if self.assistant_only_loss and not self.completion_only_loss:
            return "answers"
        return "all" if self.completion_only_loss is False else "completion"
