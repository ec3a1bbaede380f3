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
