"""The rows that a recipe names: one data set or a mixture, and what is held out of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from trl_llava.configs.recipe import make_parser
from trl_llava.data.splits import load_splits
from trl_llava.errors import RecipeError


def write(folder: Path, name: str, count: int) -> str:
    """A file of text-only rows whose prompts are `<name> 0`, `<name> 1`, ..."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{name} {index}"}],
            "completion": [{"role": "assistant", "content": "yes"}],
        }
        for index in range(count)
    ]
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return str(folder / f"{name}.json")


def load(folder: Path, *args: str, stage: str = "sft", **recipe: Any) -> tuple[list[str], list[str] | None]:
    (folder / "recipe.yaml").write_text(json.dumps({"output_dir": "unused", "bf16": False, "use_cpu": True, **recipe}))
    parser = make_parser(stage)
    script_args, training_args, _, mixture, _ = parser.parse(["--config", str(folder / "recipe.yaml"), *args])
    train, held_out = load_splits(script_args, mixture, training_args, "sft" if stage == "sft" else "prompt")
    return prompts(train), None if held_out is None else prompts(held_out)


def prompts(rows: Any) -> list[str]:
    return [row["prompt"][0]["content"][0]["text"] for row in rows]


def test_one_data_set(tmp_path: Path) -> None:
    assert load(tmp_path, dataset_name=write(tmp_path, "a", 3)) == (["a 0", "a 1", "a 2"], None)


def test_a_mixture_keeps_order(tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path, "a", 2)}, {"path": write(tmp_path, "b", 1)}]
    assert load(tmp_path, datasets=sources) == (["a 0", "a 1", "b 0"], None)


def test_a_mixture_has_margins_everywhere_or_nowhere(tmp_path: Path) -> None:
    for name, more in (("a", {"margin": 1}), ("b", {})):
        words = {"prompt": ("user", "?"), "chosen": ("assistant", "yes"), "rejected": ("assistant", "no")}
        row = {column: [{"role": role, "content": text}] for column, (role, text) in words.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps([{**row, **more}]))
    sources = [{"path": str(tmp_path / "a.json")}, {"path": str(tmp_path / "b.json")}]
    recipe = {"output_dir": "unused", "bf16": False, "use_cpu": True, "datasets": sources}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    script_args, args, _, mixture, _ = make_parser("dpo").parse(["--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(RecipeError, match=r"b\.json has no margin, but .*a\.json has one"):
        load_splits(script_args, mixture, args, "preference")


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"test_split_size": 0.99}, "`test_split_size: 0.99` leaves none of 4 rows for training"),
        ({"per_device_train_batch_size": 5, "dataloader_drop_last": True}, "leaves nothing of 4 rows"),
        ({"per_device_train_batch_size": 5, "dataloader_drop_last": True, "stage": "ppo"}, "leaves nothing of 4 rows"),
    ],
)
def test_rows_must_be_left_to_train_on(tmp_path: Path, recipe: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load(tmp_path, dataset_name=write(tmp_path, "a", 4), **recipe)


def test_fractions_repeat_no_row(tmp_path: Path) -> None:
    # 3 of 4 rows shall be from `a`, which has 6: so 8 rows in all, 2 of `b`.
    sources = [{"path": write(tmp_path, "a", 6), "fraction": 3}, {"path": write(tmp_path, "b", 6), "fraction": 1}]
    train, _ = load(tmp_path, datasets=sources)
    assert [sum(prompt.startswith(name) for prompt in train) for name in "ab"] == [6, 2]


def test_a_fraction_is_drawn_by_the_seed(tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path, "a", 40), "fraction": 1}, {"path": write(tmp_path, "b", 4), "fraction": 1}]
    train, _ = load(tmp_path, datasets=sources)
    drawn = [prompt for prompt in train if prompt.startswith("a")]
    assert len(drawn) == 4 and drawn != ["a 0", "a 1", "a 2", "a 3"]  # the file may be sorted
    assert load(tmp_path, datasets=sources) == (train, None)
    assert load(tmp_path, "--seed", "1", datasets=sources) != (train, None)


@pytest.mark.parametrize(("size", "held_out"), [(2, 2), (0.5, 4)])
def test_rows_are_held_out_by_the_seed(tmp_path: Path, size: float, held_out: int) -> None:
    path = write(tmp_path, "a", 8)
    train, test = load(tmp_path, dataset_name=path, test_split_size=size)
    assert test is not None
    assert (len(train), len(test)) == (8 - held_out, held_out)
    assert set(train) | set(test) == {f"a {index}" for index in range(8)}
    assert load(tmp_path, dataset_name=path, test_split_size=size) == (train, test)
    assert load(tmp_path, "--seed", "1", dataset_name=path, test_split_size=size) != (train, test)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "neither is given"),
        ({"dataset_name": "{a}", "datasets": [{"path": "{a}"}]}, "both are given"),
        ({"datasets": [{"path": "{a}"}], "streaming": True}, "`streaming` must stay false"),
        (
            {"datasets": [{"path": "{a}"}], "eval_strategy": "steps"},
            "`eval_strategy: steps` .* needs `test_split_size`",
        ),
        ({"datasets": [{"path": "{a}", "fraction": 1}, {"path": "{a}"}]}, "`fraction`, above 0, for all"),
        ({"dataset_name": "{a}", "test_split_size": 4}, "whole number below the 4 rows, found 4"),
        ({"dataset_name": "{a}", "test_split_size": -1}, "`test_split_size` must be"),
        ({"dataset_name": "{a}", "test_split_size": 1.5}, "`test_split_size` must be"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, recipe: dict[str, Any], message: str) -> None:
    path = write(tmp_path, "a", 4)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, **json.loads(json.dumps(recipe).replace("{a}", path)))
