"""docs/deviations.md names tests and options; all of them exist."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.reward import LlavaRewardConfig
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "deviations.md"
ROWS = [
    re.split(r"(?<!\\)\|", line)[1:-1]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "the original | ours" not in line
]


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_each_row_names_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 4, "a row has four cells: the original, ours, test, option"
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[2])
    assert named
    for file, test in named:
        assert test.startswith("test_") and test in functions(TESTS / file), f"{file} has no {test}"


def test_each_option_exists() -> None:
    classes = (LlavaScriptArguments, LlavaModelConfig, LlavaRewardConfig, LlavaPPOConfig)
    known = {field.name for cls in classes for field in fields(cls)}
    named = {name for row in ROWS for name in re.findall(r"`(\w+): [^`]*`", row[3])}
    assert len(named) > 8
    assert named <= known
