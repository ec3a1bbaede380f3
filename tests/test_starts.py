"""What a reward or value model starts from: whose base it is, and that its head starts where it should."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, NotFoundError, RecipeError
from trl_llava.hub.lookup import local_base
from trl_llava.models.starts import (
    adapter_base,
    agreed_base,
    load_policy_start,
    load_score_model,
    with_base,
    zero_head,
)
from trl_llava.ppo.roles import load_policy_roles, load_value_model
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.convert.merge import merge

TARGETS = r".*language_model\..*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def policy_adapter(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir)
    folder = tmp_path_factory.mktemp("policy_adapter")
    get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).save_pretrained(folder)
    return folder


def head(model: nn.Module) -> list[float]:
    return [value for name, p in model.named_parameters() if "score" in name for value in p.flatten().tolist()]


def test_adapter_base_tells_adapters_from_models(tiny_llava_dir: Path, policy_adapter: Path) -> None:
    assert adapter_base(str(policy_adapter)) == str(tiny_llava_dir)
    assert adapter_base(str(tiny_llava_dir)) is None


@pytest.mark.parametrize("field", ["freeze_projector", "freeze_vision_tower"])
def test_a_part_that_the_adapter_does_not_hold_cannot_be_trained(
    field: str, tiny_llava_dir: Path, policy_adapter: Path
) -> None:
    args = LlavaModelConfig(model_name_or_path=str(tiny_llava_dir), **{field: False})
    message = rf"`{field}: false` cannot be honoured: adapter '.*' has no weights of that part"
    with pytest.raises(InputError, match=message):
        load_score_model(str(policy_adapter), args)
    args.adapter_name_or_path = str(policy_adapter)
    with pytest.raises(InputError, match=message):
        load_policy_start(args)
    ppo = LlavaPPOConfig(sft_model_path=str(policy_adapter), bf16=False, use_cpu=True, report_to="none")
    args.adapter_name_or_path = None
    with pytest.raises(InputError, match=message):
        load_policy_roles(ppo, args)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_part_that_the_adapter_holds_is_trained_or_frozen_as_configured(
    frozen: bool, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    base = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir)
    whole = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["multi_modal_projector"])
    get_peft_model(base, whole).save_pretrained(tmp_path)
    args = LlavaModelConfig(model_name_or_path=str(tiny_llava_dir), freeze_projector=frozen)
    ppo = LlavaPPOConfig(sft_model_path=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    args.adapter_name_or_path = str(tmp_path)
    models = [load_score_model(str(tmp_path), args), load_policy_start(args)[0]]
    args.adapter_name_or_path = None
    models.append(load_policy_roles(ppo, args).model)
    for model in models:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("lora_A" in name for name in trained)
        assert any("multi_modal_projector" in name for name in trained) == (not frozen)
        assert all(".default" in name for name in trained)


def test_the_entry_point_names_the_adapters_itself(tiny_llava_dir: Path, policy_adapter: Path) -> None:
    settings = {"bf16": False, "use_cpu": True, "report_to": "none"}
    whole = LlavaModelConfig(model_name_or_path=str(tiny_llava_dir))
    ppo = LlavaPPOConfig(sft_model_path=str(policy_adapter), ref_adapter_name="other", **settings)
    with pytest.raises(RecipeError, match="`ref_adapter_name` must stay null"):
        load_policy_roles(ppo, whole)
    ppo = LlavaPPOConfig(ref_adapter_name="reference", **settings)
    with pytest.raises(RecipeError, match="`ref_adapter_name` must stay null"):
        load_policy_roles(ppo, whole)


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({}, False),
        # As many image tokens in another way; what makes another number does not fit the model, and is refused.
        ({"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}, True),
    ],
)
def test_a_value_model_that_lays_out_images_differently_keeps_its_processor(
    change: dict[str, object], own: bool, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "value")
    settings = json.loads((tmp_path / "value" / "processor_config.json").read_text())
    (tmp_path / "value" / "processor_config.json").write_text(json.dumps({**settings, **change}))
    ppo = LlavaPPOConfig(value_model_path=str(tmp_path / "value"), bf16=False, use_cpu=True, report_to="none")
    args = LlavaModelConfig(model_name_or_path=str(tiny_llava_dir))
    processor = load_value_model(ppo, args, load_policy_roles(ppo, args))[1]
    assert (processor is not None) == own


@pytest.mark.parametrize(
    ("given", "trained_on", "base"),
    [
        (None, "org/base", "org/base"),
        ("org/base", None, "org/base"),
        ("org/base", "org/base", "org/base"),
        ("org/base", "/no/such/folder", "org/base"),  # trained on another machine
    ],
)
def test_agreed_base(given: str | None, trained_on: str | None, base: str) -> None:
    assert agreed_base(given, "adapter", trained_on) == base


def test_bases_that_differ_are_named() -> None:
    with pytest.raises(RecipeError, match=r"`model_name_or_path` is org/a, but adapter x was trained on org/b: leave"):
        agreed_base("org/a", "x", "org/b")
    with pytest.raises(RecipeError, match="adapter x names no base model: set `model_name_or_path`"):
        agreed_base(None, "x", None)


def test_a_policys_adapter_gets_a_new_head(policy_adapter: Path) -> None:
    model = load_score_model(str(policy_adapter), LlavaModelConfig(), seed=3)
    again = load_score_model(str(policy_adapter), LlavaModelConfig(), seed=3)
    assert any(head(model)) and head(model) == head(again)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trainable if "score" in name} == {"default"}
    zero_head(model)
    assert not any(head(model))


def test_another_checkpoint_with_the_same_options() -> None:
    options = LlavaModelConfig(model_name_or_path="a", model_revision="b", dtype="bfloat16")
    options.trust_remote_code = True
    other = with_base(options, "c", None)
    assert (other.model_name_or_path, other.model_revision) == ("c", "main")
    assert (other.dtype, other.trust_remote_code, options.model_name_or_path) == ("bfloat16", True, "a")


def test_a_base_with_a_relative_name_is_found_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "models" / "llava").mkdir(parents=True)
    (tmp_path / "models" / "llava" / "config.json").write_text("{}")
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    for adapter in ("sft", str(tmp_path / "runs" / "sft")):
        assert local_base(adapter, "models/llava") == str(tmp_path / "models" / "llava")
        assert local_base(adapter, "../models/llava") == "../models/llava"  # it is there
        assert local_base(adapter, "llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_a_base_that_is_not_there_is_said_to_be_the_adapters(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "./gone", "task_type": "SEQ_CLS"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for load in (
        lambda: merge(str(tmp_path), tmp_path / "merged"),
        lambda: FactualReward.from_pretrained(str(tmp_path), judging_prompt=JudgingPrompt()),
    ):
        with pytest.raises(NotFoundError, match=r"adapter_config\.json of .* names.*: cannot load '\./gone'"):
            load()
