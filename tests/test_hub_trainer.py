"""`push_to_hub` of the trainers from Python pushes what the commands push: no pickles, no paths, our card."""

from pathlib import Path
from typing import Any

import hub_server
import pytest
import test_reward_trainer
import test_sft_trainer
import tiny_trainers
from peft import LoraConfig
from transformers import Trainer

from trl_llava import cli
from trl_llava.publish import push as hub_push
from trl_llava.publish.push import PushError
from trl_llava.publish.repository import HubError

PUSH = {
    "push_to_hub": True,
    "hub_model_id": "tiny",
    "hub_always_push": True,
    "save_strategy": "steps",
    "save_steps": 1,
}
LORA = {"r": 2, "target_modules": tiny_trainers.TARGETS}


def sft(base: Path, folder: Path, **changes: Any) -> Trainer:
    rows = test_sft_trainer.rows(2)
    return test_sft_trainer.make_trainer(
        base, folder / "run", rows, peft_config=LoraConfig(**LORA), max_steps=2, **changes
    )


def reward(base: Path, folder: Path, **changes: Any) -> Trainer:
    rows, lora = test_reward_trainer.rows(2), LoraConfig(**LORA, modules_to_save=["score"])
    given = {"train_dataset": rows, "peft_config": lora, "max_steps": 2, **changes}
    return test_reward_trainer.make_trainer(base, folder / "run", **given)


def ppo(base: Path, folder: Path, **changes: Any) -> Trainer:
    adapter = tiny_trainers.make_adapter(base, folder / "adapter")
    return tiny_trainers.ppo_trainer(base, adapter, folder / "run", **changes)


@pytest.mark.parametrize("make", [sft, reward, ppo])
def test_what_is_pushed(hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path, make: Any) -> None:
    trainer = make(tiny_llava_dir, tmp_path, **PUSH)
    trainer.train()
    repo = hub.repos["models", "tester/tiny"]
    assert sorted(repo.tags) == ["checkpoint-1", "checkpoint-2"]  # nothing is still under way
    url = trainer.push_to_hub(dataset_name="org/rows")
    assert url == f"{hub.url}/tester/tiny/commit/{repo.branches['main']}"
    for files in repo.commits.values():
        assert not any(path.endswith((".bin", ".pt", ".pth")) for path in files)
        text = b"".join(content for path, content in files.items() if not path.endswith(".safetensors"))
        assert str(tmp_path).encode() not in text and str(tiny_llava_dir).encode() not in text
    files = hub.files("tester/tiny")
    card = files["README.md"].decode()
    assert {"adapter_model.safetensors", "tokenizer.json", "curves.png"} <= set(files)
    assert "trained from `" in card and "with trl-llava" in card and "datasets:\n- org/rows" in card
    line = {"reward": "FactualReward.from_pretrained("}.get(trainer.stage, "AutoModelForImageTextToText")
    assert line in card and "--config" not in card
    assert trainer.stage == make.__name__


def test_only_at_the_end(hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path) -> None:
    trainer = sft(tiny_llava_dir, tmp_path, **PUSH, hub_strategy="end")
    trainer.train()
    repo = hub.repos["models", "tester/tiny"]
    assert set(hub.files("tester/tiny")) == {".gitattributes"}
    trainer.save_model()  # upstream pushes here, too
    assert not repo.tags and "adapter_model.safetensors" in hub.files("tester/tiny")
    assert repo.titles[-1] == "Model save"
    with pytest.raises(ValueError, match="blocking"):
        trainer.push_to_hub(blocking=False)


def test_a_token_of_its_own(
    hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="needs a token with write access, and there is none"):
        sft(tiny_llava_dir, tmp_path, **PUSH)
    trainer = sft(tiny_llava_dir, tmp_path, **PUSH, hub_token=hub_server.WRITE_TOKEN)
    trainer.train()
    asked = {token for _, path, token in hub.requests if "tester/tiny" in path or path == "/api/repos/create"}
    assert asked == {hub_server.WRITE_TOKEN}
    text = b"".join(
        content for files in hub.repos["models", "tester/tiny"].commits.values() for content in files.values()
    )
    assert hub_server.WRITE_TOKEN.encode() not in text
    assert hub_server.WRITE_TOKEN not in repr(trainer._pushes.push.repository)


def test_a_hub_that_is_away(
    hub: hub_server.Hub,
    tiny_llava_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hub_push, "FIRST_WAIT", 0.01)
    trainer = sft(tiny_llava_dir, tmp_path, **PUSH)
    hub.fail("POST", "/commit/", status=503, times=100)
    trainer.train()
    assert "Not pushed to tester/tiny: checkpoint-1, checkpoint-2" in capsys.readouterr().out
    with pytest.raises(PushError, match="the run is whole in") as error:
        trainer.push_to_hub()
    hub.faults.clear()
    command = str(error.value).splitlines()[-1].split()
    assert cli.main(command[1:]) == 0
    assert sorted(hub.repos["models", "tester/tiny"].tags) == ["checkpoint-1", "checkpoint-2"]
