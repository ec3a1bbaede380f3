"""Towers and projectors that are trained beside an adapter, in families where one lies inside the other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from test_entry_points import Work

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapters import freeze_as_configured, load_adapter, lora_config
from trl_llava.models.load import load_policy
from trl_llava.models.vision_tower import part_of

Folder = Callable[[str], Path]
PROJECTOR = {"freeze_projector": False}
BOTH = {"freeze_projector": False, "freeze_vision_tower": False}
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3")


@pytest.mark.parametrize("settings", [PROJECTOR, BOTH], ids=["projector", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_saved_and_comes_back(
    name: str, settings: dict[str, bool], family_folder: Folder, tmp_path: Path
) -> None:
    base = str(family_folder(name))
    args = LlavaModelConfig(model_name_or_path=base, dtype="float32", use_peft=True, lora_r=2, **settings)
    model = load_policy(args)
    model = get_peft_model(model, lora_config(args, model, task="CAUSAL_LM"))
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad and "lora_" not in key}
    wanted = {"projector", "tower"} if settings is BOTH else {"projector"}
    assert {part_of(key) for key in trained} == wanted
    with torch.no_grad():
        for value in trained.values():
            value.add_(1)
    model.save_pretrained(tmp_path)
    back = freeze_as_configured(load_adapter(load_policy(args), str(tmp_path), is_trainable=True), str(tmp_path), args)
    again = {key: value for key, value in back.named_parameters() if value.requires_grad and "lora_" not in key}
    assert again.keys() == trained.keys() and all(torch.equal(again[key], trained[key]) for key in trained)


def test_a_tower_without_the_projector_inside_it_is_refused(family_folder: Folder) -> None:
    args = LlavaModelConfig(
        model_name_or_path=str(family_folder("qwen2_5_vl")), use_peft=True, freeze_vision_tower=False
    )
    with pytest.raises(ValueError, match="lies inside its tower"):
        lora_config(args, load_policy(args), task="CAUSAL_LM")


def test_stages_pass_a_trained_merger_on(family_folder: Folder, tmp_path: Path) -> None:
    work, words = Work(tmp_path, family_folder("qwen3_vl")), ["--freeze_projector", "false"]
    work.sft("policy", "--use_peft", "--lora_r", "2", *words)
    work.reward("reward_model", "--use_peft", "--lora_r", "2", *words)
    starts = ["--sft_model_path", str(tmp_path / "policy"), "--reward_model_path", str(tmp_path / "reward_model")]
    trainer = work.ppo("ppo", *starts, *words)
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    before, after = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("policy", "ppo"))
    mergers = [key for key in before if "merger" in key]
    assert mergers and all(not torch.equal(before[key], after[key]) for key in mergers if key.endswith("weight"))
