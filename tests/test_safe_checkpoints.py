"""A training that a signal stops saves and resumes exactly; a full disk costs no checkpoint."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_reward_trainer
import test_sft_trainer
import torch
from tiny_trainers import even_tokens, make_adapter, ppo_trainer
from transformers import Trainer, TrainerCallback

from trl_llava.errors import ExplainedError
from trl_llava.run import checkpoint_folders, safe_checkpoints, signals
from trl_llava.run.checkpoint_folders import checkpoints, find_checkpoint, step_of
from trl_llava.run.disk_full import DiskFullError, explain_full_disk
from trl_llava.run.launch import with_resume
from trl_llava.run.manifest import DamagedCheckpointError, check_manifest
from trl_llava.run.signals import Stopped

TIMED = ("time/", "tokens_per_second", "eps", "train_runtime", "train_s", "train_steps")
STEPS = {"sft": 4, "reward": 4, "ppo": 3}


class At(TrainerCallback):
    """Does something when a step begins (SFT and reward) or its completions are scored (PPO)."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.left, self.action = step, action

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    def reward(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.on_step_begin()
        return even_tokens(completion_ids)


def build(stage: str, base: Path, folder: Path, at: At | None = None, **changes: Any) -> Trainer:
    at = at or At(0, lambda: None)
    if stage == "ppo":
        adapter = folder.parent / "adapter"
        if not adapter.is_dir():
            make_adapter(base, adapter)
        return ppo_trainer(base, adapter, folder, total_episodes=12, reward_funcs=at.reward, **changes)
    module = test_sft_trainer if stage == "sft" else test_reward_trainer
    changes = {"max_steps": STEPS[stage], "lr_scheduler_type": "cosine", **changes}
    return module.make_trainer(base, folder, callbacks=[at], **changes)


def numbers(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if not k.startswith(TIMED)} for entry in trainer.state.log_history]


def same(first: Trainer, second: Trainer) -> bool:
    expected, actual = (trainer.accelerator.unwrap_model(trainer.model).state_dict() for trainer in (first, second))
    weights = all(torch.equal(value, actual[name]) for name, value in expected.items())
    return weights and numbers(first) == numbers(second)


@pytest.mark.parametrize(("stage", "name"), [("sft", "SIGTERM"), ("reward", "SIGINT"), ("ppo", "SIGTERM")])
def test_a_signal_ends_the_run_after_the_step_and_it_resumes_exactly(
    tiny_llava_dir: Path, tmp_path: Path, capfd: Any, stage: str, name: str
) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    whole = build(stage, tiny_llava_dir, tmp_path / "whole")
    whole.train()
    at = At(2, lambda: os.kill(os.getpid(), number))
    stopped = build(stage, tiny_llava_dir, tmp_path / "run", at, save_only_model=True)  # resumable all the same
    with pytest.raises(Stopped) as raised:
        stopped.train()
    assert raised.value.code == 128 + number and signal.getsignal(number) == before
    said = capfd.readouterr()
    assert f"{name}: finishing this step, then saving" in said.err
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert f"stopped by {name} after step 2 of {STEPS[stage]}; all is saved in {checkpoint}. Resume with" in said.out
    resumed = build(stage, tiny_llava_dir, tmp_path / "run")
    torch.manual_seed(12345)
    resumed.train(resume_from_checkpoint=True)
    assert same(whole, resumed)


def test_a_second_ctrl_c_stops_at_once(tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    patient = build("sft", tiny_llava_dir, tmp_path / "patient", At(2, twice))
    with pytest.raises(Stopped):  # what terminal and launcher both pass on is one press
        patient.train()
    monkeypatch.setattr(signals, "_ONE_PRESS", 0.0)
    trainer = build("sft", tiny_llava_dir, tmp_path / "run", At(2, twice), save_strategy="steps", save_steps=1)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) == before
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["checkpoint-1"]


def test_a_run_whose_launcher_is_gone_stops(tiny_llava_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    parent = os.getppid()
    trainer = build("sft", tiny_llava_dir, tmp_path, At(2, lambda: monkeypatch.setattr(os, "getppid", lambda: 1)))
    assert parent != 1
    with pytest.raises(Stopped) as raised:
        trainer.train()
    assert raised.value.code == 143 and trainer.state.global_step == 2


def test_the_command_that_resumes() -> None:
    words = ["trl-llava", "ppo", "--config", "a b.yaml", "--resume_from_checkpoint", "old", "--seed", "1"]
    expected = ["trl-llava", "ppo", "--config", "a b.yaml", "--seed", "1", "--resume_from_checkpoint"]
    assert with_resume(words) == expected == with_resume(expected)
    assert with_resume(["x", "--resume_from_checkpoint=true", "--seed", "1"]) == [
        *("x", "--seed", "1", "--resume_from_checkpoint")
    ]


# Written by torch, by Python and by ourselves: /dev/full is a disk without room that needs no root.
PLACES = {
    "sft": ("rng_state.pth", "trainer_state.json", "loop_state_0_of_1.json", "manifest.json"),
    "ppo": ("optimizer.pt", "scheduler.pt", "ppo_state.json", "value_model/adapter_config.json"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage, files in PLACES.items() for file in files])
def test_a_full_disk_leaves_the_last_checkpoint(
    tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, file: str
) -> None:
    real_start = safe_checkpoints.start_checkpoint

    def start(run_dir: Path, step: int) -> None:
        real_start(run_dir, step)
        if step == 2:
            place = run_dir / f"_checkpoint-{step}.unfinished" / f"checkpoint-{step}" / file
            place.parent.mkdir(exist_ok=True)
            place.symlink_to("/dev/full")

    run = tmp_path / "run"
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with monkeypatch.context() as patched:
        patched.setattr(safe_checkpoints, "start_checkpoint", start)
        with pytest.raises(DiskFullError) as error:
            build(stage, tiny_llava_dir, run, **saving).train()
    message = str(error.value)
    assert f"cannot write checkpoint-2: the disk of {run} is full" in message and "free now" in message
    assert f"{run / 'checkpoint-1'} is whole" in message and "it takes about" in message
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["checkpoint-1"]
    check_manifest(run / "checkpoint-1")
    resumed = build(stage, tiny_llava_dir, run, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS[stage]


def test_the_other_writers_errors_are_known(tmp_path: Path) -> None:
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (rust, OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("iostream error")):
        with pytest.raises(DiskFullError, match="There is no checkpoint yet"), explain_full_disk(tmp_path, "it"):
            raise error
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error)) as raised, explain_full_disk(tmp_path, "it"):
            raise error
        assert not isinstance(raised.value, ExplainedError)


BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "eval_strategy": "steps",
    "eval_steps": 1,
}
SAVING = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 10.0}


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder)]


@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", {"save_total_limit": 2}), ("sft", {"peft_config": None, "greater_is_better": True}), ("reward", {})],
    ids=["two adapters", "one whole model", "one adapter with a head"],
)
def test_best_and_last_stay_and_the_best_is_what_ends(
    tiny_llava_dir: Path, tmp_path: Path, stage: str, more: dict[str, Any]
) -> None:
    rows = {"sft": test_sft_trainer, "reward": test_reward_trainer}[stage].rows(3)
    changes = {"eval_dataset": rows, "save_total_limit": 1, **BEST, **SAVING, **more}
    trainer = build(stage, tiny_llava_dir, tmp_path / "run", **changes)
    trainer.train()
    best, run = trainer.state.best_global_step, tmp_path / "run"
    assert best < 4 and steps_in(run) == [best, 4]
    for step in (best, 4):
        check_manifest(run / f"checkpoint-{step}")
        saved = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert saved["best_model_checkpoint"] == str(run / f"checkpoint-{best}")
    trainer.save_model(str(tmp_path / "end"), _internal_call=True)
    weights = next(path.name for path in (tmp_path / "end").glob("*model.safetensors"))
    assert (tmp_path / "end" / weights).read_bytes() == (run / f"checkpoint-{best}" / weights).read_bytes()
    run.rename(tmp_path / "moved")
    moved = build(stage, tiny_llava_dir, tmp_path / "moved", **changes)
    moved.train(resume_from_checkpoint=True)
    assert same(trainer, moved) and moved.state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{best}")
    (tmp_path / "moved" / f"checkpoint-{best}" / weights).write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=f"checkpoint-{best} is damaged: {weights}: expected"):
        build(stage, tiny_llava_dir, tmp_path / "moved", **changes).train(resume_from_checkpoint=True)
    assert steps_in(tmp_path / "moved") == [best, 4]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_limit_of_one_keeps_the_last_good_one_behind_a_damaged_one(
    tiny_llava_dir: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    build(stage, tiny_llava_dir, tmp_path / "run", **saving).train()
    for step in range(2, STEPS[stage] + 1):
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    good = str(find_checkpoint(tmp_path / "run", "previous"))
    assert good.endswith("checkpoint-1")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    limited = build(stage, tiny_llava_dir, tmp_path / "run", save_total_limit=1, **saving)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_folders, "write_manifest", full)  # all is written, and the later ones set aside
        with pytest.raises(DiskFullError):
            limited.train(resume_from_checkpoint=good)
    check_manifest(good)
    assert find_checkpoint(tmp_path / "run", "previous") == Path(good)
    limited = build(stage, tiny_llava_dir, tmp_path / "run", save_total_limit=1, **saving)
    limited.train(resume_from_checkpoint=good)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == [f"checkpoint-{STEPS[stage]}"]
    check_manifest(tmp_path / "run" / f"checkpoint-{STEPS[stage]}")


def test_transformers_own_handling_of_sigterm_is_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        trainer = build("sft", tiny_llava_dir, tmp_path, enable_jit_checkpoint=True)
        with pytest.raises(ExplainedError, match="`enable_jit_checkpoint` must stay False"):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, handler)
