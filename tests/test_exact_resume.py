"""SFT and reward training resumed from any checkpoint are the uninterrupted run, bit for bit: numbers and weights."""

import dataclasses
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import test_reward_trainer
import test_sft_trainer
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.recipe import make_parser
from trl_llava.run.output_dir import NOT_COMPARED, differences
from trl_llava.stage_run import _keep_to_cpus

TIMED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
LORA = {"r": 4, "lora_dropout": 0.3, "target_modules": r".*language_model\..*\.(q_proj|v_proj|down_proj)"}
# 10 rows are 3 steps per epoch, the last one of a single row: every kind of place is among 7 steps.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,
    "lr_scheduler_type": "cosine",
    "seed": 5,
}


def different(rows: Dataset, column: str) -> Dataset:
    """Rows of different lengths, so that order matters."""

    def number(row: dict[str, Any], index: int) -> dict[str, Any]:
        row[column][-1]["content"] += " and more" * index
        return row

    return rows.map(number, with_indices=True)


def sft(base: Path, folder: Path, **changes: Any) -> Trainer:
    rows = different(test_sft_trainer.rows(10), "messages")
    torch.manual_seed(0)
    return test_sft_trainer.make_trainer(
        base, folder, rows, **{"peft_config": LoraConfig(**LORA), **SETTINGS, **changes}
    )


def reward(base: Path, folder: Path, **changes: Any) -> Trainer:
    rows = different(test_reward_trainer.rows(10), "chosen")
    peft_config = LoraConfig(**LORA, modules_to_save=["score"])
    return test_reward_trainer.make_trainer(
        base, folder, **{"train_dataset": rows, "peft_config": peft_config, **SETTINGS, **changes}
    )


def numbers(trainer: Trainer) -> list[dict[str, float]]:
    return [{key: value for key, value in e.items() if key not in TIMED} for e in trainer.state.log_history]


def check(make: Callable[..., Trainer], base: Path, folder: Path, steps: list[int], **changes: Any) -> None:
    whole = make(base, folder, **changes)
    whole.train()
    expected = whole.model.state_dict()
    assert len(numbers(whole)) == 3
    for step in steps:
        resumed = make(base, folder, **{**changes, "save_strategy": "no"})
        torch.manual_seed(12345)  # all generators are restored
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        actual = resumed.model.state_dict()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(value, actual[name]) for name, value in expected.items()), step
        assert numbers(resumed) == numbers(whole), step


@pytest.mark.parametrize("make", [sft, reward])
def test_a_resumed_run_is_the_uninterrupted_one(make: Callable[..., Trainer], tiny_llava_dir: Path, tmp_path: Path):
    check(make, tiny_llava_dir, tmp_path, [1, 3, 5, 7])  # within, at the end of, and in a later epoch; at the very end


@pytest.mark.parametrize("make", [sft, reward])
def test_so_it_is_with_data_loader_workers(make: Callable[..., Trainer], tiny_llava_dir: Path, tmp_path: Path):
    check(make, tiny_llava_dir, tmp_path, [4], dataloader_num_workers=1)


@pytest.mark.parametrize("make", [sft, reward])
def test_so_it_is_without_an_adapter(make: Callable[..., Trainer], tiny_llava_dir: Path, tmp_path: Path):
    check(make, tiny_llava_dir, tmp_path, [4], peft_config=None)


FREE = {
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "logging_first_step": True,
    "logging_strategy": "no",
    "save_steps": 2,
    "save_total_limit": 1,
    "report_to": "tensorboard",
    "run_name": "another",
    "log_level": "error",
    "disable_tqdm": True,
    "dataset_num_proc": 2,
    "ddp_timeout": 7,
    "hub_model_id": "me/other",
    "card_samples": 0,
}
"""Another value for a field that changes no result."""


def test_what_changes_no_result_is_tested() -> None:
    assert set(FREE) <= NOT_COMPARED
    config = {field.name for field in dataclasses.fields(LlavaPPOConfig)} | set(make_parser("sft").field_names)
    assert set(FREE) <= config


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_resumed_run_may_log_load_and_save_otherwise(stage: str, tiny_llava_dir: Path, tmp_path: Path) -> None:
    """One run to its end; one resumed with each field changed, one after the other, and with all; the same weights."""
    stage_runs.write_rows(tmp_path)
    words = stage_runs.run_words(tmp_path, tiny_llava_dir, tmp_path / "whole", stage, 1)
    if stage == "ppo":
        for earlier in ("sft", "reward"):
            start = stage_runs.run_words(tmp_path, tiny_llava_dir, tmp_path / "start", earlier, 1, "--max_steps", "1")
            stage_runs.run(earlier, start)
    stage_runs.run(stage, words)
    expected = load_file(tmp_path / "whole" / stage / "adapter_model.safetensors")
    changes = {name: value for name, value in FREE.items() if name != "report_to" or find_spec("tensorboard")}
    one_by_one: list[dict[str, Any]] = [{name: value} for name, value in changes.items()]
    for change in [*(one_by_one if stage == "sft" else []), changes]:
        folder = tmp_path / "-".join(change)[:40]
        shutil.copytree(tmp_path / "whole" / stage, folder)
        given = [word for name, value in change.items() for word in (f"--{name}", str(value))]
        checkpoint = str(folder / "checkpoint-1")
        stage_runs.run(stage, [*words, "--output_dir", str(folder), "--resume_from_checkpoint", checkpoint, *given])
        actual = load_file(folder / "adapter_model.safetensors")
        assert expected.keys() == actual.keys()
        assert all(torch.equal(value, actual[name]) for name, value in expected.items()), change
        shutil.rmtree(folder)


def test_what_does_change_a_result_is_refused() -> None:
    now = {"learning_rate": 1.0, "logging_steps": 1, "save_steps": 5}
    before = {"learning_rate": 2.0, "logging_steps": 9, "save_steps": 1}
    assert differences(before, now, now) == ["`learning_rate` (2.0 there, 1.0 now)"]
    chooses = {**now, "load_best_model_at_end": True}
    assert differences({**before, **chooses, "save_steps": 1}, chooses, chooses) == ["`save_steps` (1 there, 5 now)"]


def test_no_more_loading_processes_than_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = TrainingArguments(str(tmp_path), dataloader_num_workers=10_000, use_cpu=True)
    _keep_to_cpus(args)
    assert 1 <= args.dataloader_num_workers < 10_000
    assert f"dataloader_num_workers: {args.dataloader_num_workers} instead of the 10000" in capsys.readouterr().err
    _keep_to_cpus(args)
    assert not capsys.readouterr().err
