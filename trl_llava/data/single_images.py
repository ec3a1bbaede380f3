"""TRL's GRPO and RLOO trainers for LLaVA-OneVision, whose processor counts the images of each row.

TRL 1.12 does not hand the count (`batch_num_images`) on to the model. The model then takes each image for the only one
of its row, so that nothing is lost as long as it is: with two, it would tile pictures that the processor did not tile.
"""

from typing import Any

from datasets import Dataset
from trl import GRPOTrainer, RLOOTrainer

from trl_llava.data.contract import RowError
from trl_llava.models.model_inputs import COUNTS


class SingleImageGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, which drops the count of images of rows that have one each."""

    def _get_per_token_logps_and_entropies(self, *args: Any, batch_num_images: Any = None, **kwargs: Any) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class SingleImageRLOOTrainer(RLOOTrainer):
    """TRL's `RLOOTrainer`, which drops the count of images of rows that have one each."""

    def _get_per_token_logps_and_entropies(self, *args: Any, batch_num_images: Any = None, **kwargs: Any) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


def check_single_images(rows: Dataset) -> None:
    """Make sure that no row has more than one image.

    Args:
        rows: Rows of the prompt stage.

    Raises:
        RowError: If a row has several.
    """
    for row in rows.select_columns(["row_name", "images"]):
        if len(row["images"]) > 1:
            raise RowError(
                row["row_name"],
                f"it has {len(row['images'])} images, and TRL's trainer does not hand their number ({COUNTS}) to the "
                "model, which would read them wrongly",
                "Leave such rows out, or use `trl-llava ppo` or `dpo`, which take them",
                "rows with several images",
            )
