"""The model card says what the run was and how it is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from trl_llava.model_card import write_model_card
from trl_llava.recipe import Recipe


def card(folder: Path, stage: str, *, adapter: bool = True, **options: Any) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(folder)), hub_model_id="me/tuned", is_world_process_zero=lambda: True
    )
    write_model_card(trainer, stage, "org/base", Recipe({"dataset_name": "org/rows"}, {}), **options)
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_metadata(tmp_path: Path) -> None:
    metadata, _ = card(tmp_path, "ppo", tags="vision")
    assert metadata == {
        "base_model": "org/base",
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
