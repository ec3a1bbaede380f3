"""Many bad rows of every kind: named, counted, skipped or refused, and no picture changes its question."""

import gc
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import bad_rows
import pytest
import torch
from test_entry_points import QUICK
from torch.utils.data import DataLoader

from trl_llava import train_ppo, train_reward, train_sft
from trl_llava.data.contract import RowError
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.tools.check_data import check_data, check_report

STAGES = {"sft": ("sft", train_sft), "preference": ("reward", train_reward), "prompt": ("ppo", train_ppo)}
PPO = [
    *("--total_episodes", "8", "--response_length", "4", "--stop_token", "eos", "--num_ppo_epochs", "1"),
    *("--num_sample_generations", "0", "--value_init", "policy", "--max_prompt_length", "400"),
    *("--reward_funcs", "test_bad_rows:sees_its_picture"),
]
SCORED: list[int] = []
"""Numbers of the rows that `sees_its_picture` has scored."""


def sees_its_picture(prompts: list[Any], images: list[Any], completion_ids: list[Any], **columns: Any) -> list[float]:
    """A reward function that fails if a picture is not the one its question names."""
    for prompt, pictures in zip(prompts, images, strict=True):
        number = bad_rows.number_of(prompt[0]["content"][-1]["text"])
        SCORED.append(number)
        assert [picture.getpixel((0, 0)) for picture in pictures] in ([], [bad_rows.mark(number)])
    return [float(sum(ids)) for ids in completion_ids]


class Data:
    """The rows of one stage, and the run over them."""

    def __init__(self, folder: Path, base: Path, stage: str, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.path, self.bad, self.good = bad_rows.write(folder / "data", stage, rows)
        self.stage, self.program = STAGES[stage]
        self.words = [
            *QUICK,
            *("--model_name_or_path", str(base), "--use_peft", "--lora_r", "2"),
            *("--dataset_name", str(self.path), "--image_folder", str(folder / "data" / "images")),
            *(PPO if self.stage == "ppo" else ["--max_steps", "3", "--max_length", "900"]),
        ]

    def run(self, out: str, *more: str) -> Any:
        return self.program.main([*self.words, "--output_dir", str(self.folder / out), *more])


def skipped(messages: list[str]) -> Counter[str]:
    """How many rows of each reason the log says were skipped or dropped."""
    counts: Counter[str] = Counter()
    for message in messages:
        if message.startswith("Skipped"):
            for count, reason in re.findall(r"(\d+) ([^()]+) \([^()]+\[\d+\]\)", message.partition("jsonl: ")[2]):
                counts[reason] += int(count)
        elif match := re.match(r"Dropped (\d+) of", message):
            counts[bad_rows.TOO_LONG] += int(match[1])
    return counts


def walk(trainer: Any, batch_size: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Collate every row as the trainer does, and hold each picture against its question.

    Returns:
        The rows' numbers, and after each batch the MiB of memory and the number of live tensors.
    """
    processor = trainer.processing_class
    numbers, held = [], []
    for i, batch in enumerate(DataLoader(trainer.train_dataset, batch_size, collate_fn=trainer.data_collator)):
        texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        shown = (batch["input_ids"] == processor.image_token_id).any(1).tolist()
        named = [bad_rows.number_of(text) for text in texts]
        # The two answers of a pair follow their common question in one row, or each has it in a row of its own.
        pair = 2 if isinstance(trainer, LlavaRewardTrainer) and "segments" not in batch else 1
        rows = len(texts) // pair
        assert named == named[:rows] * pair
        bad_rows.check_marks(texts[:rows], shown[:rows], batch.get("pixel_values"), processor)
        numbers += named[:rows]
        if i % 50 == 0:
            held.append((resident(), live_tensors()))
    return numbers, held


def resident() -> int:
    """MiB of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


def check_run(data: Data, caplog: pytest.LogCaptureFixture, *more: str) -> list[tuple[int, int]]:
    """Run over bad rows, and hold counts, rows and pictures against what was written."""
    caplog.clear()
    SCORED.clear()
    with caplog.at_level(logging.WARNING, logger="trl_llava"):
        trainer = data.run("out", "--on_bad_row", "skip", "--overlong", "drop", *more)
    assert skipped(caplog.messages) == data.bad
    assert trainer.state.global_step == trainer.state.max_steps > 1
    assert len(SCORED) == (8 if data.stage == "ppo" else 0)
    numbers, held = walk(trainer, 16)
    assert numbers == data.good
    return held


@pytest.mark.parametrize("stage", STAGES)
def test_every_kind_is_named_counted_and_skipped(
    stage: str, tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Data(tmp_path, tiny_llava_dir, stage, 1000)
    check_run(data, caplog)
    assert {kind[2] for kind in bad_rows.BAD if stage in kind[1]} == set(data.bad)

    shown = [reason for reason in data.bad if reason not in (bad_rows.TOO_LONG, "damaged image")]
    with pytest.raises(RowError) as caught:
        data.run("none", "--overlong", "drop")
    first = min(set(range(1000)) - set(data.good))
    assert str(caught.value).startswith(f"{stage}.jsonl[{first}]: ")
    assert all(f"{data.bad[reason]} {reason}" in str(caught.value) for reason in shown)


@pytest.mark.parametrize("stage", STAGES)
def test_check_data_counts_them_before_a_run(
    stage: str, tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(tmp_path, tiny_llava_dir, stage, 100)
    reports: list[check_report.SourceReport] = []
    monkeypatch.setattr(check_data, "print_report", lambda console, found, *rest: reports.extend(found))
    words = [*data.words, "--output_dir", "none", "--dataset_num_proc", "1", "--stage", data.stage]
    assert check_data.main([*words, "--on_bad_row", "skip", "--overlong", "drop"]) == 0
    assert check_data.main(words) == 1
    for report in reports:
        assert report.reasons + Counter({bad_rows.TOO_LONG: report.over_limit}) == data.bad
        assert report.rows == 100


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_thousand_rows(
    stage: str, tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Data(tmp_path, tiny_llava_dir, stage, 20_000)
    before = resident()
    held = check_run(data, caplog, "--per_device_train_batch_size", "4")
    print(f"{stage}: {before} MiB before the run; (MiB, tensors) over the walk: {held[:2]} ... {held[-2:]}")
    memory, tensors = zip(*held, strict=True)
    assert memory[-1] - memory[1] < 30
    assert tensors[-1] <= tensors[1]
