"""`org/name@v1`: taken apart once, the same for models, data and commands."""

from pathlib import Path

import pytest

from trl_llava.configs.grpo import LlavaGRPOConfig
from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.hub.names import split_revision


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1", ("org/name", "v1")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("gpt2@0123456789abcdef", ("gpt2", "0123456789abcdef")),
        ("org/name/folder@v1", ("org/name/folder", "v1")),
        ("./a@b", ("./a@b", None)),
        ("/data/a@b", ("/data/a@b", None)),
        ("~/a@b", ("~/a@b", None)),
        ("org/name@", ("org/name@", None)),
        ("me@example.com/x", ("me", "example.com/x")),
    ],
)
def test_split(name: str, split: tuple[str, str | None]) -> None:
    assert split_revision("field", name) == split


def test_a_folder_keeps_its_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs@home" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_revision("field", "runs@home/sft") == ("runs@home/sft", None)


def test_two_revisions() -> None:
    assert split_revision("field", "org/name@v1", "v1") == ("org/name", "v1")
    with pytest.raises(InputError, match=r"field: 'org/name@v1' names the revision 'v1', and its revision field 'v2'"):
        split_revision("field", "org/name@v1", "v2")


def test_every_model_field_of_a_recipe() -> None:
    model = LlavaModelConfig(model_name_or_path="org/base@v1", adapter_name_or_path="org/lora@v2")
    assert (model.model_name_or_path, model.model_revision) == ("org/base", "v1")
    assert (model.adapter_name_or_path, model.adapter_revision) == ("org/lora", "v2")
    assert LlavaModelConfig(model_name_or_path="org/base").model_revision == "main"
    with pytest.raises(InputError, match=r"`model_name_or_path`: 'org/base@v1' names"):
        LlavaModelConfig(model_name_or_path="org/base@v1", model_revision="v3")
    args = LlavaPPOConfig(
        sft_model_path="org/sft@a", reward_model_path="org/rm@b", value_model_path="org/v@c", use_cpu=True, bf16=False
    )
    assert (args.sft_model_path, args.sft_model_revision) == ("org/sft", "a")
    assert (args.reward_model_path, args.reward_model_revision) == ("org/rm", "b")
    assert (args.value_model_path, args.value_model_revision) == ("org/v", "c")
    online = LlavaGRPOConfig(reward_model_path="org/rm@b", use_cpu=True, bf16=False)
    assert (online.reward_model_path, online.reward_model_revision) == ("org/rm", "b")
