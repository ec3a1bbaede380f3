"""The config of DPO."""

from dataclasses import dataclass

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
