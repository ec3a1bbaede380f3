"""SFT and reward training resumed from any checkpoint are the uninterrupted run, bit for bit: numbers and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_reward_trainer
import test_sft_trainer
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer

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
