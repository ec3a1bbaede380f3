"""A reward model of another family than the policy: it reads text and images, not ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_entry_points import Work

from trl_llava import train_grpo, train_rloo

PAIRS = [("llava", "qwen2_5_vl"), ("qwen2_5_vl", "llava")]


@pytest.fixture(scope="module")
def trained(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """For two families a folder with "policy", an adapter of SFT, and "reward_model", an adapter of stage 2."""
    works = {}
    for name in ("llava", "qwen2_5_vl"):
        works[name] = Work(tmp_path_factory.mktemp(name), family_folder(name))
        works[name].sft("policy", "--use_peft", "--lora_r", "2")
        works[name].reward("reward_model", "--use_peft", "--lora_r", "2")
    return works


@pytest.mark.parametrize(("judged", "judge"), PAIRS)
def test_ppo_with_a_judge_of_another_family(
    trained: dict[str, Work], judged: str, judge: str, caplog: pytest.LogCaptureFixture
) -> None:
    work, reward = trained[judged], str(trained[judge].folder / "reward_model")
    trainer = work.ppo("ppo", "--sft_model_path", str(work.folder / "policy"), "--reward_model_path", reward)
    first, *_ = trainer.state.log_history
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5) and first["objective/scores"] != 0
    assert "The value model starts from the policy" in caplog.text
    saved = json.loads((work.folder / "ppo" / "value_model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(work.base)


def test_its_head_is_no_start_for_the_value_model(trained: dict[str, Work]) -> None:
    work, reward = trained["llava"], str(trained["qwen2_5_vl"].folder / "reward_model")
    with pytest.raises(ValueError, match=r"policy and value model .* do not fit together"):
        work.ppo(
            *("refused", "--sft_model_path", str(work.folder / "policy")),
            *("--reward_model_path", reward, "--value_head", "reward"),
        )


@pytest.mark.parametrize("stage", [train_grpo, train_rloo], ids=["grpo", "rloo"])
@pytest.mark.parametrize(("judged", "judge"), PAIRS)
def test_online_stages_with_a_judge_of_another_family(
    trained: dict[str, Work], judged: str, judge: str, stage: Any
) -> None:
    work, reward = trained[judged], str(trained[judge].folder / "reward_model")
    words = ["--model_name_or_path", str(work.base), "--adapter_name_or_path", str(work.folder / "policy")]
    sizes = ["--max_steps", "2", "--max_completion_length", "4", "--num_generations", "2"]
    trainer = stage.main(work.words("ppo", stage.__name__, *words, *sizes, "--reward_model_path", reward))
    rewards = [entry["rewards/factual_reward/mean"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 2 and all(rewards)
