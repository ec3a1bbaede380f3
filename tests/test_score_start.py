"""What a reward or value model starts from: whose base it is, and that its head starts where it should."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from trl_llava.configs import LlavaModelConfig
from trl_llava.recipe_values import RecipeError
from trl_llava.score_start import adapter_base, agreed_base, load_score_model, with_base, zero_head

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
