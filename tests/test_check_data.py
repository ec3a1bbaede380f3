"""`trl-llava check-data` on files in the published shapes: what it counts, and when it says that a run would fail."""

import doctest
import json
import re
from pathlib import Path
from typing import Any

import published
import pytest
import tiny_models
from rich.console import Console

from trl_llava import cli
from trl_llava.errors import RecipeError
from trl_llava.tools.check_data import check_data, check_report
from trl_llava.tools.recipe_stage import find_stage


class Published:
    """The published files, and recipes that read them."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = published.write(folder), base

    def recipe(self, stage: str, **values: Any) -> Path:
        rows = {"sft": "sft", "reward": "preferences", "dpo": "preferences"}.get(stage, "ppo")
        recipe = {
            "model_name_or_path": str(self.base),
            "output_dir": "unused",
            "dataset_name": f"{self.folder}/{rows}.json",
            "image_folder": f"{self.folder}/coco",
            "bf16": True,  # as a recipe for GPUs has it
            "dataset_num_proc": 1,
        }
        recipe |= {} if stage in ("sft", "dpo") else {"captions_file": f"{self.folder}/image_to_caption.json"}
        recipe |= {"reward_funcs": ["math:fsum"]} if rows == "ppo" else {}
        path = self.folder / f"{stage}.yaml"
        path.write_text(json.dumps({**recipe, **values}))
        return path

    def change(self, name: str, row: int, **values: Any) -> str:
        rows = json.loads((self.folder / f"{name}.json").read_text())
        rows[row] |= values
        path = self.folder / f"{name}_changed.json"
        path.write_text(json.dumps(rows))
        return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_llava_dir: Path) -> Published:
    return Published(tmp_path_factory.mktemp("published") / "data", tiny_llava_dir)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[check_report.SourceReport]:
    """What the last check found."""
    found: list[check_report.SourceReport] = []
    print_report = check_report.print_report

    def keep(console: Console, reports: list[check_report.SourceReport], *args: Any) -> None:
        found[:] = reports
        print_report(console, reports, *args)

    monkeypatch.setattr(check_data, "print_report", keep)
    return found


def run(path: Path, *words: str) -> int:
    return cli.main(["check-data", "--config", str(path), *words])


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_published_conversations_and_preferences_pass(
    files: Published, stage: str, reports: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files.recipe(stage)) == 0
    (report,) = reports
    assert (report.rows, report.usable, report.text_only, report.without_captions) == (
        100,
        100,
        0,
        100 * (stage == "dpo"),
    )
    assert {tokens - text for tokens, text in zip(report.tokens, report.text_tokens, strict=True)} == {16}
    shown = capsys.readouterr().out
    assert "ok: all rows that a run would use can be used" in shown
    assert report.moved == 100 * (stage != "sft") and (check_report.MOVED in shown) == bool(report.moved)
    assert "USER: <image>*16\n" in shown
    assert ("the quality score of my last response is" in shown) == (stage == "reward")


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_published_prompts_are_counted_by_answer_type(
    stage: str, files: Published, reports: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files.recipe(stage, dataset_num_proc=2), "--samples", "1") == 0
    assert dict(reports[0].answer_types) == {"general": 70, "A": 4, "B": 4, "C": 4, "D": 4, "no": 7, "yes": 7}
    assert len(reports[0].samples) == 1 and reports[0].samples[0][1].endswith(" ASSISTANT:")
    assert "Usable rows by answer type" in capsys.readouterr().out


def test_a_mixture_is_counted_by_source(files: Published, reports: list[Any]) -> None:
    whole = {"path": f"{files.folder}/sft.json", "fraction": 3}
    other = {"path": f"{files.folder}/sft.json", "split": "train[:10]", "fraction": 1}
    path = files.recipe("sft", dataset_name=None, datasets=[whole, other])
    assert run(path) == 0
    assert [(report.name.removeprefix(str(files.folder)), report.rows) for report in reports] == [
        ("/sft.json", 100),
        ("/sft.json (train[:10])", 10),
    ]


def test_rated_completions_and_a_captions_column(
    files: Published, reports: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """VLFeedback's layout: pairs on a level are counted and make no run fail, whatever `on_bad_row` says."""
    shown = {"prompt": "What is it?", "img_path": "000000000001.jpg", "gt_caption": "A street."}
    records = []
    for ratings in (("5", "1"), ("3", "3"), ("4", "2")):
        notes = [{"Visual Faithfulness": {"Rating": rating, "Rationale": ""}} for rating in ratings]
        texts = [{"response": text, "annotations": note} for text, note in zip(("Yes.", "No."), notes, strict=True)]
        records.append({**shown, "completions": texts})
    (files.folder / "rated.json").write_text(json.dumps(records))
    rows = {"dataset_name": f"{files.folder}/rated.json", "captions_file": None}
    assert run(files.recipe("reward", **rows, captions_column="gt_caption")) == 0
    assert (reports[0].rows, reports[0].usable, reports[0].reasons) == (3, 2, {"tie": 1})
    assert "  - A street." in capsys.readouterr().out
    assert run(files.recipe("reward", **rows, captions_column="captoin")) == 1


def test_what_makes_a_run_fail(files: Published, reports: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    (files.folder / "coco" / "damaged.jpg").write_bytes(
        (files.folder / "coco" / "000000000001.jpg").read_bytes()[:900]
    )
    damaged = files.change("sft", 7, image="damaged.jpg")
    assert run(files.recipe("sft", dataset_name=damaged)) == 1
    assert reports[0].count(check_report.UNREADABLE) == 1
    assert "sft_changed.json[7]: the image" in capsys.readouterr().out
    assert run(files.recipe("sft", dataset_name=damaged), "--on_bad_row", "skip") == 0

    assert run(files.recipe("sft", dataset_name=files.change("sft", 3, image="gone.jpg"))) == 1
    assert reports[0].count(check_report.MISSING) == 1

    assert run(files.recipe("reward", dataset_name=files.change("preferences", 0, image="gone.jpg"))) == 1
    (files.folder / "coco" / "unknown.jpg").write_bytes((files.folder / "coco" / "000000000001.jpg").read_bytes())
    assert run(files.recipe("reward", dataset_name=files.change("preferences", 0, image="unknown.jpg"))) == 1
    assert reports[0].without_captions == 1

    assert run(files.recipe("sft", max_length=120)) == 1
    assert 0 < reports[0].over_limit < 100
    assert "are too long: max_length allows 120 tokens" in capsys.readouterr().out
    assert run(files.recipe("sft", max_length=120, overlong="drop")) == 0
    assert run(files.recipe("sft", max_length=20, overlong="drop")) == 1
    assert run(files.recipe("sft", dataset_name=f"{files.folder}/none.json")) == 1
    assert run(files.recipe("sft", test_split_size=100)) == 1
    assert run(files.recipe("sft", model_name_or_path="nobody/nothing")) == 1
    assert "cannot load 'nobody/nothing'" in capsys.readouterr().out


def test_columns_that_nobody_reads_and_margins_with_gaps(files: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files.recipe("dpo", dataset_name=files.change("preferences", 0, note="x"))) == 0
    assert re.search(r"columns of .* that are not read: .*\bnote\b", capsys.readouterr().out)
    gap = files.change("preferences", 0, margin=1.0)
    assert run(files.recipe("dpo", dataset_name=gap)) == 1
    assert "preferences_changed.json[1]: it has no margin" in capsys.readouterr().out
    mixture = [{"path": gap, "split": "train[:1]"}, {"path": f"{files.folder}/preferences.json"}]
    assert run(files.recipe("dpo", dataset_name=None, datasets=mixture)) == 1
    assert "preferences.json has no margin, but" in capsys.readouterr().out


def test_rows_that_a_chat_template_cannot_render(
    files: Published, reports: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no_stop.jinja").write_text("{% for m in messages %}{{ m['role'] }}: <image>{% endfor %}")
    path = files.recipe("sft", chat_template_path=str(tmp_path / "no_stop.jinja"))
    assert run(path, "--on_bad_row", "skip") == 1
    assert reports[0].reasons == {"cannot be rendered": 100}


def test_prompts_need_captions_if_the_reward_model_shows_them(
    files: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"format_version": 1, "judging_prompt": {"with_captions": True}}
    (tmp_path / "factual_reward.json").write_text(json.dumps(settings))
    path = files.recipe("ppo", captions_file=None, reward_model_path=str(tmp_path))
    assert run(path) == 1
    assert "100 of 100 rows of" in capsys.readouterr().out
    assert run(path, "--on_bad_row", "skip") == 1
    assert "none of the 100 rows of" in capsys.readouterr().out
    settings["judging_prompt"]["with_captions"] = False  # type: ignore[index]
    (tmp_path / "factual_reward.json").write_text(json.dumps(settings))
    assert run(path) == 0


@pytest.mark.parametrize(
    ("stage", "words", "reader"),
    [("ppo", ["--use_vllm"], "vLLM"), ("grpo", [], "TRL's trainer"), ("rloo", [], "TRL's trainer"), ("ppo", [], None)],
)
def test_several_images_where_each_is_read_alone(
    files: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    words: list[str],
    reader: str | None,
) -> None:
    picture = next(files.folder.glob("coco/*.jpg")).name
    rows, question = tmp_path / "rows.jsonl", [{"role": "user", "content": "What?"}]
    rows.write_text("".join(json.dumps({"prompt": question, "images": [picture] * n}) + "\n" for n in (0, 1, 2, 2)))
    processor = tiny_models.onevision_processor()
    for name in ("load_recipe_processor", "load_policy_processor"):
        monkeypatch.setattr(check_data, name, lambda *_, **__: processor)
    path = files.recipe(stage, dataset_name=str(rows), captions_file=None)
    words = [*words, *(["--per_device_train_batch_size", "2"] if stage == "ppo" else [])]  # there are four rows
    assert run(path, *words) == (1 if reader else 0)
    found = f"2 of 4 rows of {rows} cannot be used, first rows.jsonl[2]: it has 2 images, and {reader} would process"
    assert (found in " ".join(capsys.readouterr().out.split())) == bool(reader)


def test_before_stage_1_has_run_a_processor_can_be_named(files: Published) -> None:
    path = files.recipe("ppo", sft_model_path="runs/not/yet", model_name_or_path=None)
    assert run(path) == 1
    assert run(path, "--processor", str(files.base)) == 0


def test_the_stage_is_found_or_asked_for(files: Published) -> None:
    recipe = files.recipe("reward")
    other = recipe.with_name("mine.yaml")
    other.write_text(recipe.read_text())
    with pytest.raises(RecipeError, match=r"mine.yaml fits sft and reward and .* and rloo: say with --stage"):
        find_stage(["--config", str(other)])
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none.yaml: No such file"):
        find_stage(["--config", str(recipe.with_name("none.yaml"))])
    with pytest.raises(RecipeError, match=r"without --config, the command line fits sft and"):
        find_stage([])
    assert find_stage(["--config", str(other), "--with_captions", "false"]) == "reward"
    assert find_stage([f"--config={recipe}"]) == "reward"
    assert run(other, "--stage", "reward") == 0
    assert run(recipe, "--learning_rte", "1") == 2


def test_histogram_has_ranges_of_one_width() -> None:
    assert doctest.testmod(check_report).failed == 0
    table = check_report.histogram("lengths", [1, 2, 30, 100, 1190])
    assert list(table.columns[0].cells)[:2] == ["1-100", "101-200"]
    assert list(table.columns[1].cells)[0::11] == ["4", "1"]
    assert table.caption == "shortest 1, median 30, 95 % 1190, 99 % 1190, longest 1190"


def test_ppo_before_stage_1_names_the_way(files: Published, capsys: pytest.CaptureFixture[str]) -> None:
    start = {"model_name_or_path": None, "sft_model_path": "runs/sft", "reward_model_path": "runs/reward"}
    path = files.recipe("ppo", **start, reward_funcs=None)
    assert run(path) == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert "`sft_model_path`: runs/sft is not there" in said and "`reward_model_path`: runs/reward is" in said
    assert "name the base's processor with --processor" in said
    assert run(path, "--processor", str(files.base), "--per_device_train_batch_size", "2") == 0
    assert "note: `reward_model_path`: runs/reward is not there" in capsys.readouterr().out
    assert run(files.recipe("ppo", **{**start, "sft_model_path": str(files.base)})) == 1
    assert "a run would fail: `reward_model_path`: runs/reward is not there" in capsys.readouterr().out


def test_rows_fewer_than_a_step(files: Published, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "4"]
    assert run(files.recipe("ppo"), *words) == 1
    assert "a step takes 256 prompts, and there are 100: lower" in capsys.readouterr().out
    assert run(files.recipe("ppo"), *words, "--num_generations_per_prompt", "4") == 0
    assert run(files.recipe("ppo", test_split_size=50), *words, "--num_generations_per_prompt", "4") == 1
    assert "a step takes 64 prompts, and there are 50: lower" in capsys.readouterr().out
    assert run(files.recipe("grpo"), *words, "--num_generations", "2") == 1
    assert "a step takes 128 prompts, and there are 100" in capsys.readouterr().out
    assert run(files.recipe("sft"), *words) == 0
    assert "note: 100 rows are fewer than the 256 of one optimizer step" in capsys.readouterr().out


def test_long_paths_stay_whole_and_a_missing_function_is_found(files: Published, capsys: Any) -> None:
    deep = files.folder / ("a_folder_with_a_long_name_" * 4)
    deep.mkdir()
    gone = [{"image": "gone/" + "x" * 90 + ".jpg", "prompt": "What is it?"}]
    (deep / "rows_with_a_rather_long_name_of_their_own.json").write_text(json.dumps(gone))
    path = str(deep / "rows_with_a_rather_long_name_of_their_own.json")
    assert run(files.recipe("ppo", dataset_name=path, captions_file=None)) == 1
    shown = capsys.readouterr().out
    assert path in shown and "gone/" + "x" * 90 + ".jpg" in shown
    assert shown.count("rows_with_a_rather_long_name_of_their_own.json ") >= 1
    assert run(files.recipe("ppo", reward_funcs=["nowhere.py:f"])) == 2
    assert "there is no file nowhere.py" in capsys.readouterr().err
