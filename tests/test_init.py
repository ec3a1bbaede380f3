"""`trl-llava init`: what it says of a folder, and recipes that run without an edit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from trl_llava.cli import main
from trl_llava.configs.recipe import make_parser

COLORS = ("red", "green", "blue", "yellow")
LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 32, "num_key_value_heads": 32}
"""With two layers: 0.2 GiB in 16 bits, 0.05 in 4; with 32,000 words another 0.25."""


def photos(folder: Path, rows: int = 8) -> list[dict[str, Any]]:
    """Rows with everything that a stage may read, and their photos in a folder of their own."""
    (folder / "photos").mkdir(parents=True)
    records = []
    for i in range(rows):
        color, other = COLORS[i % 4], COLORS[(i + 1) % 4]
        photo = Image.new("RGB", (60 + i % 5, 48), "white")
        ImageDraw.Draw(photo).rectangle((8, 8, 40, 40), fill=color)
        photo.save(folder / "photos" / f"{i}.jpg")
        record = {"images": [f"photos/{i}.jpg"], "prompt": "What is it?", "captions": [f"a {color} square"]}
        records.append({**record, "chosen": f"A {color} square.", "rejected": f"A {other} circle."})
    return records


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def init(folder: Path, base: Path, *words: str) -> dict[str, dict[str, Any]]:
    """The recipes that it writes, by stage."""
    assert main(["init", str(folder), "--base", str(base), *words]) == 0
    return {path.stem: yaml.safe_load(path.read_text()) for path in (folder / "recipes").glob("*.yaml")}


def test_each_stage_gets_the_rows_made_for_it(tmp_path: Path, tiny_llava_dir: Path, capsys: Any) -> None:
    records = photos(tmp_path / "mine", 64)
    (tmp_path / "mine" / "deep").mkdir()
    questions = [{"image": f"{i}.jpg", "question": "What color?"} for i in range(64)]
    write(tmp_path / "mine" / "deep" / "questions.jsonl", questions)
    write(tmp_path / "mine" / "pairs.jsonl", [{**record, "captions": None} for record in records])
    names = {f"photos/{i}.jpg": record["captions"] for i, record in enumerate(records)}
    names |= {f"{i}.jpg": record["captions"] for i, record in enumerate(records)}
    (tmp_path / "mine" / "captions.json").write_text(json.dumps(names))
    talks = [
        {
            "image": f"{i}.jpg",
            "conversations": [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": "Red."}],
        }
        for i in range(40)
    ]
    (tmp_path / "mine" / "llava.json").write_text(json.dumps(talks))
    write(tmp_path / "mine" / "test.jsonl", records[:4])
    recipes = init(tmp_path / "mine", tiny_llava_dir)
    folder = tmp_path / "mine"
    assert {stage: Path(recipe["dataset_name"]).name for stage, recipe in recipes.items()} == {
        **{"sft": "llava.json", "reward": "pairs.jsonl"},
        "ppo": "questions.jsonl",
    }
    assert (recipes["sft"]["image_folder"], recipes["ppo"]["image_folder"]) == (str(folder / "photos"),) * 2
    assert "image_folder" not in recipes["reward"]  # beside the file
    assert recipes["reward"]["with_captions"] is True
    assert {recipes[stage]["captions_file"] for stage in ("reward", "ppo")} == {str(folder / "captions.json")}
    assert recipes["ppo"]["sft_model_path"] == recipes["sft"]["output_dir"]
    assert recipes["ppo"]["reward_model_path"] == recipes["reward"]["output_dir"]
    said = capsys.readouterr().out
    assert "64 images, 3 files of rows" in said
    assert (
        "llava.json: 40 rows: completions (sft), prompts (ppo); captions from the file; images of photos -> sft"
        in said
    )
    assert "captions.json: captions of 128 images" in said
    assert "not used: test.jsonl: by its name it is not for training" in said
    for stage, recipe in recipes.items():
        assert f"trl-llava {stage} --config {folder / 'recipes' / f'{stage}.yaml'}" in said
        parsed = make_parser(stage).parse(["--config", str(folder / "recipes" / f"{stage}.yaml")])
        assert parsed.training_args.use_cpu
        assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] <= recipe_rows(recipe)


def recipe_rows(recipe: dict[str, Any]) -> int:
    return 40 if recipe["dataset_name"].endswith("llava.json") else 64 - recipe.get("test_split_size", 0)


def test_images_of_equal_names_are_those_beside_the_rows_or_nobodys(
    tmp_path: Path, tiny_llava_dir: Path, capsys: Any
) -> None:
    mine = tmp_path / "mine"
    records = photos(mine)
    shutil.copytree(mine / "photos", mine / "augmented" / "photos")
    write(mine / "rows.jsonl", records)
    (mine / "rows").mkdir()
    write(mine / "rows" / "other.jsonl", records)
    recipes = init(mine, tiny_llava_dir)
    assert recipes["sft"]["dataset_name"] == str(mine / "rows.jsonl")
    assert "image_folder" not in recipes["sft"]
    alike = f"rows/other.jsonl: its images are in {mine} and in {mine / 'augmented'} alike"
    assert alike in capsys.readouterr().out


def test_links_that_lead_back_up_are_not_followed(tmp_path: Path, tiny_llava_dir: Path, capsys: Any) -> None:
    write(tmp_path / "rows.jsonl", photos(tmp_path / "mine"))
    (tmp_path / "rows.jsonl").rename(tmp_path / "mine" / "rows.jsonl")
    for name in ("self", "again"):
        (tmp_path / "mine" / name).symlink_to(tmp_path / "mine")
    init(tmp_path / "mine", tiny_llava_dir)
    assert "mine: 8 images, 1 file of rows" in capsys.readouterr().out


def test_sizes_count_the_rows_that_can_be_used(tmp_path: Path, tiny_llava_dir: Path) -> None:
    records = photos(tmp_path / "mine", 64)
    for record in records[4:]:
        record["images"] = ["lost.jpg"]
    write(tmp_path / "mine" / "rows.jsonl", records)
    recipe = init(tmp_path / "mine", tiny_llava_dir)["ppo"]
    assert "test_split_size" not in recipe
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 2


def test_a_file_with_next_to_nothing_is_not_chosen_because_it_was_made_for_a_stage(
    tmp_path: Path, tiny_llava_dir: Path
) -> None:
    records = photos(tmp_path / "mine", 24)
    write(tmp_path / "mine" / "pairs.jsonl", records)
    (answer,) = [{"images": row["images"], "prompt": "Hi", "completion": row["chosen"]} for row in records[:1]]
    write(tmp_path / "mine" / "answers.jsonl", [answer, {**answer, "images": ["lost.jpg"]}])
    assert init(tmp_path / "mine", tiny_llava_dir)["sft"]["dataset_name"] == str(tmp_path / "mine" / "pairs.jsonl")


def test_without_preferences_it_says_what_is_missing(tmp_path: Path, tiny_llava_dir: Path, capsys: Any) -> None:
    talks = [
        {"images": record["images"], "prompt": record["prompt"], "completion": record["chosen"]}
        for record in photos(tmp_path / "mine")
    ]
    write(tmp_path / "mine" / "rows.jsonl", [*talks, {**talks[0], "images": ["photos/gone.jpg"]}])
    recipes = init(tmp_path / "mine", tiny_llava_dir)
    said = capsys.readouterr().out
    assert set(recipes) == {"sft"} and recipes["sft"]["on_bad_row"] == "skip"
    assert "no preferences, so no reward.yaml, and DPO is not possible; PPO needs another reward model" in said
    assert "1 of 9 rows of rows.jsonl cannot be used and are left out, first rows.jsonl[8]: " in said
    shutil.rmtree(tmp_path / "mine" / "recipes")
    recipes = init(tmp_path / "mine", tiny_llava_dir, "--reward_model", "me/llava-rm")
    assert set(recipes) == {"sft", "ppo"} and recipes["ppo"]["reward_model_path"] == "me/llava-rm"


@pytest.mark.slow
def test_sizes_are_those_that_fit_the_card(tmp_path: Path, tiny_llava_dir: Path, capsys: Any) -> None:
    base = shutil.copytree(tiny_llava_dir, tmp_path / "base")
    (base / "model.safetensors").unlink()  # a plan reads no weights
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= LARGE
    config["text_config"].pop("head_dim", None)
    (base / "config.json").write_text(json.dumps(config))
    records = [{**record, "captions": None} for record in photos(tmp_path / "mine", 64)]
    write(tmp_path / "mine" / "rows.jsonl", records)
    found = {}
    for memory in ("24", "1.3"):
        recipes = init(tmp_path / "mine", base, "--gpu-memory", memory)
        assert {recipe["bf16"] for recipe in recipes.values()} == {True}
        found[memory] = [recipes["sft"][key] for key in ("per_device_train_batch_size", "load_in_4bit")]
        assert f"of {memory} GiB, by `trl-llava plan`." in (tmp_path / "mine" / "recipes" / "sft.yaml").read_text()
        shutil.rmtree(tmp_path / "mine" / "recipes")
    assert found == {"24": [16, False], "1.3": [2, False]}
    said = capsys.readouterr().out
    assert "for a GPU of 24 GiB" in said
    assert "not all rows have captions: the reward model reads none" in said


def test_a_base_that_is_not_here_is_said(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "mine" / "rows.jsonl", photos(tmp_path / "mine"))
    recipes = init(tmp_path / "mine", Path("nobody/nothing"), "--gpu-memory", "24")
    assert set(recipes) == {"sft", "reward", "ppo"}
    assert recipes["sft"]["per_device_train_batch_size"] == 1 and "max_length" not in recipes["sft"]
    assert (
        "rows are not measured and micro-batches are of one row, as the base cannot be read" in capsys.readouterr().out
    )


def test_a_shipped_recipe_of_the_base_gives_its_template(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "rows.jsonl", photos(tmp_path / "mine"))
    recipes = init(tmp_path / "mine", Path("llava-hf/llava-1.5-7b-hf"))
    assert (recipes["sft"]["chat_template_path"], recipes["ppo"]["pad_to_square"]) == ("vicuna_v1", True)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "has 0 images and no file of rows: expected .json, .jsonl or .parquet"),
        ({"a.jsonl": "nonsense\n"}, "nothing in "),
        ({"a.jsonl": "nonsense\n"}, "a.jsonl[0]: it is not JSON"),
        ({"a.jsonl": '{"text": "hello"}\n'}, "it has no prompt; found the columns ['text']"),
        ({"a.json": '[{"image": "gone.jpg", "prompt": "What?"}]'}, "gone.jpg"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    files: dict[str, str], error: str, tmp_path: Path, capsys: Any
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["init", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and error in line
    assert not (tmp_path / "recipes").exists()


def test_recipes_that_are_there_stay(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "rows.jsonl", photos(tmp_path))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "ppo.yaml").write_text("mine")
    assert main(["init", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ppo.yaml is there already, and nothing was written" in line
    assert [path.name for path in (tmp_path / "recipes").iterdir()] == ["ppo.yaml"]
    assert main(["init", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_newcomers_64_rows_go_through_all_stages_without_an_edit(tmp_path: Path, tiny_llava_dir: Path) -> None:
    records = photos(tmp_path / "mine", 64)
    write(tmp_path / "mine" / "rows.jsonl", [{**record, "completion": record["chosen"]} for record in records])
    command = [sys.executable, "-m", "trl_llava.cli"]
    shown = subprocess.run(
        [*command, "init", "mine", "--base", str(tiny_llava_dir)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.split() for line in shown.partition("Run, in this directory:")[2].splitlines() if line.strip()]
    assert [words[1] for words in lines] == ["sft", "reward", "ppo"]
    for words in lines:
        done = subprocess.run([*command, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "finished after step" in done.stdout
    assert {path.name for path in (tmp_path / "mine" / "runs").iterdir()} == {"sft", "reward", "ppo"}
