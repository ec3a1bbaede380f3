"""Whole runs to the Hub and back: push, delete, load by ID, equal numbers."""

import json
import shutil
from pathlib import Path

import hub_server
import pytest
import tiny_models

from trl_llava import train_ppo, train_reward, train_sft

QUICK = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--save_strategy", "steps"),
    *("--save_steps", "1", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "0.01"),
    *("--push_to_hub", "--hub_always_push", "--hub_token", hub_server.WRITE_TOKEN),
]
QUESTION = [{"role": "user", "content": "what is it?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write_rows(folder: Path) -> Path:
    colors = ["red", "blue"] * 2
    for color in set(colors):
        tiny_models.image(color).save(folder / f"{color}.png")
    rows = [{"images": [f"{color}.png"], "prompt": QUESTION, "captions": [f"a {color} square"]} for color in colors]
    answers = {"completion": answer("a square"), "chosen": answer("a square"), "rejected": answer("a dog")}
    for name, columns in (("sft", ["completion"]), ("reward", ["chosen", "rejected"]), ("ppo", [])):
        written = [{**row, **{column: answers[column] for column in columns}} for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(written))
    return folder


def test_three_stages_by_hub_id(
    hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = hub.add("org/base", tiny_llava_dir)
    base.tags["v1"] = base.branches["main"]
    base.commit({}, title="weights gone")  # whoever asks for another revision gets nothing
    rows = write_rows(tmp_path)
    monkeypatch.delenv("HF_TOKEN")

    def words(stage: str, *more: str) -> list[str]:
        places = ["--dataset_name", f"{rows}/{stage}.json", "--output_dir", f"{tmp_path}/{stage}"]
        return [*QUICK, *places, "--hub_model_id", f"tiny-{stage}", *more]

    def finished(stage: str, *more: str) -> dict[str, bytes]:
        main = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}[stage].main
        main(words(stage, *more))
        shutil.rmtree(tmp_path / stage)
        repo = hub.repos["models", f"tester/tiny-{stage}"]
        assert sorted(repo.tags) == ["checkpoint-1", "checkpoint-2"]
        return hub.files(f"tester/tiny-{stage}")

    lora = ["--model_name_or_path", "org/base@v1", "--use_peft", "--lora_r", "2", "--max_steps", "2"]
    finished("sft", *lora)
    reward = finished("reward", *lora)
    assert "factual_reward.json" in reward
    start = ["--sft_model_path", "tester/tiny-sft@checkpoint-2", "--reward_model_path", "tester/tiny-reward"]
    short = ["--total_episodes", "4", "--response_length", "4", "--stop_token", "eos", "--num_ppo_epochs", "1"]
    ppo = finished("ppo", *start, *short, "--num_sample_generations", "0")
    assert {"value_model/adapter_model.safetensors", "adapter_model.safetensors", "ppo_state.json"} <= set(ppo)
    for stage in ("sft", "reward", "ppo"):
        files = hub.files(f"tester/tiny-{stage}")
        assert {"curves.png", "samples/1.jpg", "samples/4.jpg", "samples/samples.json", "README.md"} <= set(files)
        assert "![picture](samples/4.jpg)" in files["README.md"].decode()
    for (_, name), repo in hub.repos.items():
        for files in repo.commits.values() if name != "org/base" else ():
            text = b"".join(content for path, content in files.items() if not path.endswith(".safetensors"))
            assert str(tmp_path).encode() not in text and hub_server.WRITE_TOKEN.encode() not in text
            assert not any(path.endswith((".bin", ".pt", ".pth")) for path in files)
