"""Whole runs to the Hub and back: push, delete, load by ID, equal numbers."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import hub_server
import hub_visitor
import pandas as pd
import pytest
import tiny_models
import yaml
from hub_login import hub_client
from safetensors.torch import load_file

from trl_llava import cli, train_grpo, train_ppo, train_reward, train_sft
from trl_llava.configs import recipe

STAGES = ("sft", "reward", "ppo")
QUICK = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--per_device_train_batch_size", "2"),
    *("--logging_steps", "1", "--learning_rate", "0.01"),
]
PUSH = [
    *("--save_strategy", "steps", "--save_steps", "1", "--push_to_hub", "--hub_always_push"),
    *("--hub_token", hub_server.WRITE_TOKEN),
]
QUESTION = [{"role": "user", "content": "what is it?"}]


class Trained(NamedTuple):
    """All three stages pushed, with rows and pictures; their folders are gone."""

    hub: hub_server.Hub
    folder: Path
    before: dict[str, list[float]]


def write_rows(folder: Path) -> Path:
    colors = ["red", "blue"] * 2
    for color in set(colors):
        tiny_models.image(color).save(folder / f"{color}.png")
    rows = [{"images": [f"{color}.png"], "prompt": QUESTION, "captions": [f"a {color} square"]} for color in colors]
    answers = {"completion": "a square", "chosen": "a square", "rejected": "a dog"}
    for name, columns in (("sft", ["completion"]), ("reward", ["chosen", "rejected"]), ("ppo", [])):
        told = {column: [{"role": "assistant", "content": answers[column]}] for column in columns}
        (folder / f"{name}.json").write_text(json.dumps([{**row, **told} for row in rows]))
    return folder


@pytest.fixture(scope="module")
def trained(
    served_hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    folder = write_rows(tmp_path_factory.mktemp("runs"))
    with hub_client(served_hub, tmp_path_factory.mktemp("cache")) as hub:
        base = hub.add("org/base", tiny_llava_dir)
        base.tags["v1"] = base.branches["main"]
        base.commit({}, title="weights gone")  # whoever asks for another revision gets nothing
        os.environ.pop("HF_TOKEN")

        def run(stage: str, main: Any, *more: str) -> None:
            places = ["--dataset_name", f"{folder}/{stage}.json", "--output_dir", f"{folder}/{stage}"]
            main([*QUICK, *PUSH, *places, "--hub_model_id", f"tiny-{stage}", *more])

        lora = ["--model_name_or_path", "org/base@v1", "--use_peft", "--lora_r", "2", "--max_steps", "2"]
        run("sft", train_sft.main, *lora)
        run("reward", train_reward.main, *lora, "--test_split_size", "2", "--eval_strategy", "steps")
        start = ["--sft_model_path", "tester/tiny-sft@checkpoint-2", "--reward_model_path", "tester/tiny-reward"]
        short = ["--total_episodes", "4", "--response_length", "4", "--stop_token", "eos", "--num_ppo_epochs", "1"]
        run("ppo", train_ppo.main, *start, *short, "--num_sample_generations", "0")
        before = {
            "logits": hub_visitor.logits(card(hub, "sft").replace("tester/tiny-sft", str(folder / "sft")), folder),
            "scores": hub_visitor.scores(str(folder / "reward"), folder),
        }
        for stage in STAGES:
            shutil.rmtree(folder / stage)
        yield Trained(hub, folder, before)


def card(hub: hub_server.Hub, stage: str) -> str:
    return hub.files(f"tester/tiny-{stage}")["README.md"].decode()


def test_what_is_there(trained: Trained) -> None:
    always = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "processor_config.json"}
    always |= {"recipe.yaml", "versions.json", "trainer_state.json", "README.md", "curves.png", "chat_template.jinja"}
    always |= {"samples/1.jpg", "samples/2.jpg", "samples/samples.json"}
    own = {
        "sft": set(),
        "reward": {"factual_reward.json"},
        "ppo": {"ppo_state.json", "value_model/adapter_model.safetensors", "value_model/adapter_config.json"},
    }
    for stage in STAGES:
        repo = trained.hub.repos["models", f"tester/tiny-{stage}"]
        assert sorted(repo.tags) == ["checkpoint-1", "checkpoint-2"]
        assert always | own[stage] <= set(repo.at("main")[1])
        for tag in repo.tags:
            needed = {name for name in always | own[stage] if not name.startswith("samples/")}
            assert needed <= set(repo.at(tag)[1]), tag


def test_nothing_private_is_there(trained: Trained) -> None:
    for stage in STAGES:
        for files in trained.hub.repos["models", f"tester/tiny-{stage}"].commits.values():
            text = b"".join(content for path, content in files.items() if not path.endswith(".safetensors"))
            assert str(trained.folder).encode() not in text and hub_server.WRITE_TOKEN.encode() not in text
            assert not any(path.endswith((".bin", ".pt", ".pth")) for path in files)


def test_the_cards(trained: Trained) -> None:
    for stage in STAGES:
        text = card(trained.hub, stage)
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "adapter")
        assert "![image](samples/2.jpg)" in text and "![curves](curves.png)" in text
        assert ("both completions scored" if stage == "reward" else "completed greedily") in text
    assert "of 2 held-out pairs (95 % interval" in card(trained.hub, "reward")
    assert 'from_pretrained("org/base", revision="v1"), "tester/tiny-ppo")' in card(trained.hub, "ppo")


def test_a_fresh_process_computes_the_same(trained: Trained, tmp_path: Path) -> None:
    """By the lines of the card; then again without the Hub, from the cache."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, hub_visitor.__file__, str(trained.folder)]
    (trained.folder / "card.md").write_text(card(trained.hub, "sft"))
    for offline in ("0", "1"):
        asked = len(trained.hub.requests)
        result = subprocess.run(
            command, env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == trained.before  # bit for bit: JSON keeps every digit
        assert (len(trained.hub.requests) > asked) is (offline == "0")


def test_score_by_hub_id(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--image", str(trained.folder / "red.png"), "--question", "what is it?", "--answer", "a square"]
    words += ["--caption", "a red square"]
    assert cli.main(["score", "--reward_model", "tester/tiny-reward@checkpoint-2", *words]) == 0
    assert capsys.readouterr().out == f"{trained.before['scores'][0]:.4f}\n"
    assert cli.main(["score", "--reward_model", "tester/tiny-reward@nowhere", *words]) == 1
    assert "cannot load 'tester/tiny-reward' (revision nowhere)" in capsys.readouterr().err


def test_merge_by_hub_id(trained: Trained, tmp_path: Path) -> None:
    assert cli.main(["merge", "tester/tiny-sft@checkpoint-2", str(tmp_path / "merged")]) == 0
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_grpo_by_hub_id(trained: Trained, tmp_path: Path) -> None:
    words = ["--dataset_name", f"{trained.folder}/ppo.json", "--output_dir", str(tmp_path / "run")]
    words += ["--model_name_or_path", "org/base@v1", "--adapter_name_or_path", "tester/tiny-sft@checkpoint-1"]
    words += ["--reward_model_path", "tester/tiny-reward", "--max_steps", "1", "--save_strategy", "no"]
    words += ["--num_generations", "2", "--max_completion_length", "4"]
    trainer = train_grpo.main([*QUICK, *words])
    assert trainer.state.global_step == 1


REVISIONS = {
    "model_name_or_path": "model_revision",
    "adapter_name_or_path": "adapter_revision",
    "sft_model_path": "sft_model_revision",
    "reward_model_path": "reward_model_revision",
    "value_model_path": "value_model_revision",
    "dataset_name": None,  # taken apart where it is read, as each of `datasets`
    "datasets": None,
    "chat_template_path": None,
    "resume_from_checkpoint": None,  # a folder only
}
"""Every field of a recipe that names a model or data -> the field that its `@revision` goes to."""


@pytest.mark.parametrize("stage", recipe.STAGES)
def test_every_field_of_a_recipe_takes_a_revision(stage: str) -> None:
    parser = recipe.make_parser(stage)
    names = {name for name in parser.field_names if re.search(r"(name_or_path|_path|^dataset_name|^datasets)$", name)}
    assert names - set(REVISIONS) == set()
    taken = {name: other for name, other in REVISIONS.items() if name in names and other is not None}
    words = [word for name in taken for word in (f"--{name}", f"org/{name}@v1")]
    *configs, resolved = parser.parse(["--use_cpu", "--bf16", "false", "--output_dir", "run", *words])
    values = {name: value for config in configs for name, value in vars(config).items()}
    assert {name: (values[name], values[other]) for name, other in taken.items()} == {
        name: (f"org/{name}", "v1") for name in taken
    }
    assert all(resolved.values[name] == f"org/{name}@v1" for name in taken)  # recipe.yaml says it as it was said


def test_every_field_reads_its_revision(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there at `main` is empty: whoever reads a file of it fails."""
    hub = trained.hub
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("sft", "reward"):
        hub.add(f"org/{name}", hub.files(f"tester/tiny-{name}", "checkpoint-2"))
    said = [{"role": "assistant", "content": "a square"}]
    rows = {"prompt": [QUESTION] * 2, "completion": [said] * 2, "captions": [["red"]] * 2}
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    hub.add("org/rows", {"data/train-00000.parquet": file.getvalue()}, kind="datasets")
    for kind, name in (("models", "org/sft"), ("models", "org/reward"), ("datasets", "org/rows")):
        repo = hub.repos[kind, name]
        repo.tags["v1"] = repo.branches["main"]
        repo.commit({}, title="all gone")
    (tmp_path / "mixture.yaml").write_text("datasets:\n- path: org/rows@v1\n")
    more = ["--model_name_or_path", "org/base@v1", "--adapter_name_or_path", "org/sft@v1", "--max_steps", "1"]
    more += ["--chat_template_path", "org/base@v1", "--config", str(tmp_path / "mixture.yaml")]
    sft = train_sft.main([*QUICK, *more, "--save_strategy", "no", "--output_dir", str(tmp_path / "sft")])
    assert sft.state.global_step == 1
    more = ["--sft_model_path", "org/sft@v1", "--reward_model_path", "org/reward@v1", "--dataset_name", "org/rows@v1"]
    more += ["--value_model_path", "org/reward@v1", "--total_episodes", "2", "--response_length", "4"]
    more += ["--stop_token", "eos", "--num_sample_generations", "0", "--save_strategy", "no"]
    ppo = train_ppo.main([*QUICK, *more, "--output_dir", str(tmp_path / "ppo")])
    assert ppo.state.global_step == 1
