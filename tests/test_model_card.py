"""The model card says what the run was and how it is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from trl_llava.publish.card_plots import CURVES, plot_curves
from trl_llava.publish.model_card import made_of, wilson_interval, write_card_of


def card(folder: Path, stage: str, *, adapter: bool = True, **options: Any) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(folder)),
        hub_model_id="me/tuned",
        is_world_process_zero=lambda: True,
        state=SimpleNamespace(log_history=options.pop("log_history", [])),
        eval_dataset=range(options.pop("pairs", 0)),
    )
    (folder / "recipe.yaml").write_text("")
    values = {"dataset_name": "org/rows@v1", **options.pop("recipe", {})}
    write_card_of(trainer, stage, options.pop("base", "org/base"), values, **options)
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_metadata(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path, "ppo", tags="vision")
    assert metadata == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["org/rows"],
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["ppo", "trl", "trl-llava", "vision"],
    }


@pytest.mark.parametrize(
    ("stage", "adapter", "line"),
    [
        (
            "sft",
            True,
            'PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("org/base"), "me/tuned")',
        ),
        ("sft", False, 'model = AutoModelForImageTextToText.from_pretrained("me/tuned")'),
        ("reward", True, 'reward = FactualReward.from_pretrained("me/tuned")'),
    ],
)
def test_how_it_is_loaded(tmp_path: Path, stage: str, adapter: bool, line: str) -> None:
    _, text = card(tmp_path, stage, adapter=adapter)
    assert line in text
    assert f"accelerate launch -m trl_llava.train_{stage} --config recipe.yaml" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("")
    metadata, _ = card(tmp_path, "sft", dataset_name=str(tmp_path / "rows.json"))
    assert "datasets" not in metadata


def test_a_whole_model(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path, "sft", adapter=False)
    assert (metadata["base_model_relation"], metadata["library_name"]) == ("finetune", "transformers")


def test_the_revision_of_the_base_is_in_the_loading_lines(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "adapter_config.json").write_text('{"revision": "v1"}')
    _, text = card(tmp_path, "sft", adapter=False)
    assert 'AutoModelForImageTextToText.from_pretrained("org/base", revision="v1"), "me/tuned")' in text


def test_terms_and_weights(tmp_path: Path) -> None:
    recipe = {"correctness_coef": 2.0, "length_coef": -10.0, "reward_model_path": "/home/me/rm", "kl_coef": 0.1}
    _, text = card(tmp_path, "ppo", recipe=recipe)
    assert "| `correctness_coef` | 2.0 |\n| `length_coef` | -10.0 |\n| `kl_coef` | 0.1 |" in text
    assert "| `reward_model_path` | rm |" in text and "/home/me" not in text


def test_accuracy_with_its_interval(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 0.7, "accuracy": 0.5}, {"step": 2, "eval_accuracy": 0.8, "eval_loss": 0.6}]
    _, text = card(tmp_path, "reward", log_history=history, pairs=10)
    assert "in 80.0% of 10 held-out pairs (95 % interval 49.0% to 94.3%, Wilson)" in text
    assert "![curves](curves.png)" in text and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("share", "count", "interval"),
    [(0.8, 10, (0.4902, 0.9433)), (0.0, 20, (0.0, 0.1611)), (1.0, 20, (0.8389, 1.0)), (0.5, 100, (0.4038, 0.5962))],
)
def test_wilson(share: float, count: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(share, count) == pytest.approx(interval, abs=5e-5)


def test_samples_are_text(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    sample = {"image": "samples/1.jpg", "prompt": "![x](http://a/b.png) <img src=x>\n# hi", "completion": "*a* `b`"}
    (tmp_path / "samples" / "samples.json").write_text(json.dumps([sample]))
    _, text = card(tmp_path, "sft")
    assert "![image](samples/1.jpg)" in text
    assert "> \\!\\[x\\](http://a/b.png) &lt;img src=x&gt; \\# hi\n\n\\*a\\* \\`b\\`" in text


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo", "grpo", "rloo"])
def test_every_stage_has_curves(tmp_path: Path, stage: str) -> None:
    names = [name for panel in CURVES[stage].values() for name in (panel, f"eval_{panel}")]
    assert plot_curves(stage, [{"step": step, **dict.fromkeys(names, 0.5)} for step in (1, 2)], tmp_path / "a.png")
    assert not plot_curves(stage, [{"step": 1, "lr": 0.1}], tmp_path / "b.png") and not (tmp_path / "b.png").exists()


def test_yes_no_is_named_only_where_its_term_is_on() -> None:
    assert made_of({"yes_no": "both", "kl_coef": 0.1}) == {"kl_coef": 0.1}
    assert made_of({"yes_no": "both", "correctness_coef": 2.0}) == {"yes_no": "both", "correctness_coef": 2.0}
