"""DPO, GRPO and RLOO resumed at any step are the uninterrupted run: numbers, completions and weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from trl_llava import train_dpo, train_grpo, train_rloo
from trl_llava.errors import InputError
from trl_llava.run.manifest import write_manifest

TIMED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")
WORDS = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--learning_rate", "0.01"),
    *("--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "3", "--gradient_accumulation_steps", "2"),
    *("--per_device_train_batch_size", "2", "--use_peft", "--lora_r", "2", "--lora_dropout", "0.3", "--beta", "0.1"),
]
# One generation, for four prompts, is for eight passes, which are four steps; six prompts make one an epoch.
ONLINE = [
    *("--reward_funcs", "tiny_trainers:even_tokens", "--num_generations", "2", "--max_completion_length", "6"),
    *("--steps_per_generation", "4", "--num_iterations", "2", "--log_completions", "--max_steps", "7"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_llava_dir: Path) -> Callable[[str], list[str]]:
    folder = tmp_path_factory.mktemp("rows")
    tiny_models.image("red").save(folder / "red.png")
    prompts, pairs = [], []
    for i in range(6):
        row = {"images": ["red.png"], "prompt": [{"role": "user", "content": "what is it?" + " now" * i}]}
        right, wrong = ([{"role": "assistant", "content": text}] for text in ("a square" + " indeed" * i, "a dog"))
        prompts.append(row)
        pairs.append({**row, "chosen": right, "rejected": wrong})
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    base = ["--model_name_or_path", str(tiny_llava_dir)]
    return lambda name: [*WORDS, *base, "--dataset_name", f"{folder}/{name}.json"]


def outcome(run: Path, trainer: Any) -> tuple[Any, ...]:
    numbers = [{k: v for k, v in entry.items() if k not in TIMED} for entry in trainer.state.log_history]
    weights = {name: weight.tolist() for name, weight in load_file(run / "adapter_model.safetensors").items()}
    last = sorted(run.glob("completions/*"))[-1:]
    return numbers, weights, [pd.read_parquet(path).to_json(orient="records") for path in last]


def check(main: Callable[[list[str]], Any], words: list[str], folder: Path, steps: list[int]) -> None:
    expected = outcome(folder / "whole", main([*words, "--output_dir", f"{folder}/whole"]))
    assert len(expected[0]) >= 3
    for step in steps:
        torch.manual_seed(12345)  # all generators are restored
        run = folder / f"from_{step}"
        checkpoint = f"{folder}/whole/checkpoint-{step}"
        resumed = main([*words, "--output_dir", str(run), "--resume_from_checkpoint", checkpoint])
        for expected_part, part in zip(expected, outcome(run, resumed), strict=True):
            assert part == expected_part, step


def test_dpo(rows: Callable[[str], list[str]], tmp_path: Path) -> None:
    check(train_dpo.main, [*rows("pairs"), "--max_steps", "6"], tmp_path, [1, 4])


@pytest.mark.parametrize(
    ("main", "steps"), [(train_grpo.main, [1, 4, 6]), (train_rloo.main, [6])], ids=["grpo", "rloo"]
)
def test_within_and_between_generations(
    main: Callable[..., Any], steps: list[int], rows: Callable[[str], list[str]], tmp_path: Path
) -> None:
    check(main, [*rows("prompts"), *ONLINE], tmp_path, steps)
    between = {path.parent.name for path in tmp_path.glob("whole/checkpoint-*/generation_0_of_1.pt")}
    assert between == {f"checkpoint-{step}" for step in (1, 2, 3, 5, 6, 7)}  # at 4 nothing is left of the completions


def test_completions_of_other_processes_are_missed(
    rows: Callable[[str], list[str]], tmp_path: Path, caplog: Any
) -> None:
    words = [*rows("prompts"), *ONLINE]
    train_grpo.main([*words, "--output_dir", f"{tmp_path}/run"])
    checkpoint = tmp_path / "run" / "checkpoint-6"
    (checkpoint / "generation_0_of_1.pt").rename(checkpoint / "generation_0_of_2.pt")
    write_manifest(checkpoint)
    train_grpo.main([*words, "--output_dir", f"{tmp_path}/more", "--resume_from_checkpoint", str(checkpoint)])
    assert "saved between two generations by another number of processes" in caplog.text


def test_a_reference_that_moves_cannot_go_on(
    rows: Callable[[str], list[str]], tmp_path: Path, caplog: Any, tiny_llava_dir: Path
) -> None:
    words = [*rows("pairs"), "--max_steps", "1", "--use_peft", "false", "--sync_ref_model"]
    words += ["--output_dir", f"{tmp_path}/run"]
    train_dpo.main(words)
    assert "a run that stops cannot resume" in caplog.text
    with pytest.raises(InputError, match="the reference moves with the policy, and is in no checkpoint"):
        train_dpo.main([*words, "--resume_from_checkpoint"])
