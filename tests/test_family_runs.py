"""The plain commands of all stages, on a tiny model of every family; `make families` prints the table of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from family_runs import STAGES, FamilyRuns
from test_tiny_families import IMAGE_TOKENS

Runs = Callable[[str], FamilyRuns]


@pytest.fixture(scope="module")
def runs(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made: dict[str, FamilyRuns] = {}

    def of(family: str) -> FamilyRuns:
        if family not in made:
            made[family] = FamilyRuns(family_folder(family), tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", IMAGE_TOKENS)
def test_a_stage_runs(family: str, stage: str, runs: Runs) -> None:
    runs(family).once(stage)


# With GRPO and RLOO, rows without images are refused beside others, and rows with several for OneVision.
UNLIKE = [(family, (1, 0, 2, 1), ("sft", "ppo", "dpo")) for family in IMAGE_TOKENS]
UNLIKE += [(family, (1, 2, 2, 1), ("grpo", "rloo")) for family in IMAGE_TOKENS if family != "llava_onevision"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "counts", "stages"), UNLIKE)
def test_rows_need_not_have_one_image_each(
    family: str,
    counts: tuple[int, ...],
    stages: tuple[str, ...],
    family_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    runs = FamilyRuns(family_folder(family), tmp_path, counts)
    for stage in stages:
        runs.once(stage)
