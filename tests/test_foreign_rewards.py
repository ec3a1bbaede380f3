"""Reward models that others have trained: Skywork-VL-Reward's layout, a Qwen2.5-VL with TRL's value head in a file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_entry_points import Work
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from trl_llava.rewards.factual_reward import FactualReward

QUESTION = [{"role": "user", "content": "What is in the picture?"}]
ANSWERS = ["A red square.", "There is a blue circle and a green triangle."]


@pytest.fixture
def skywork(family_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """The published layout: the generation model's files, and value_head.safetensors beside them."""
    folder = tmp_path / "Skywork-VL-Reward"
    shutil.copytree(family_folder("qwen2_5_vl"), folder)
    torch.manual_seed(0)
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    save_file(head, folder / "value_head.safetensors")
    return folder


def published_score(folder: Path, answer: str, image: Any) -> float:
    """As its card scores: the value at the last token of the rendered conversation."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION[0]["content"]}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    head = load_file(folder / "value_head.safetensors")
    return float(hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"][0])


def test_it_scores_as_published(skywork: Path) -> None:
    image = tiny_models.image("red")
    reward = FactualReward.from_pretrained(str(skywork), dtype="float32")
    assert not reward.needs_captions
    scores = reward(
        [QUESTION] * 2, [[{"role": "assistant", "content": answer}] for answer in ANSWERS], images=[[image]] * 2
    )
    assert scores == pytest.approx([published_score(skywork, answer, image) for answer in ANSWERS], abs=1e-4)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def test_it_judges_a_llava_in_ppo(skywork: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    work = Work(tmp_path, tiny_llava_dir)
    work.sft("policy", "--use_peft", "--lora_r", "2")
    trainer = work.ppo("ppo", "--sft_model_path", str(tmp_path / "policy"), "--reward_model_path", str(skywork))
    assert trainer.state.log_history[0]["objective/scores"] != 0


def test_a_head_of_another_width_is_refused(skywork: Path) -> None:
    save_file({"v_head.summary.weight": torch.randn(1, 16)}, skywork / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"holds .*'weight': \(1, 16\).*, expected"):
        FactualReward.from_pretrained(str(skywork))
