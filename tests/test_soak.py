"""A long PPO run holds on to nothing: memory, tensors and open files after many steps are those after a few."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_trainers
import torch
from transformers import TrainerCallback


class Held(TrainerCallback):
    """What the process holds, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.found: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            gc.collect()
            tensors = [kept for kept in gc.get_objects() if isinstance(kept, torch.Tensor)]
            self.found.append(
                {
                    "step": state.global_step,
                    "MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20,
                    "tensors": len(tensors),
                    "tensor bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                    "open files": len(os.listdir("/proc/self/fd")),
                    "objects": len(gc.get_objects()),
                }
            )


def soak(base: Path, folder: Path, steps: int, every: int) -> list[dict[str, int]]:
    """Train with saves and sample answers all along; what was held every so many steps."""
    held = Held(every)
    trainer = tiny_trainers.ppo_trainer(
        base,
        tiny_trainers.make_adapter(base, folder / "adapter"),
        folder / "run",
        total_episodes=4 * steps,
        response_length=4,
        learning_rate=1e-5,
        eval_dataset=tiny_trainers.prompt_rows(2),
        num_sample_generations=steps // every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        normalize_scores="first_batch",
        callbacks=[held],
    )
    trainer.train()
    checkpoints = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 2 and f"checkpoint-{steps}" in checkpoints
    logged = json.loads((folder / "run" / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    assert (
        len(logged) == steps + 1 + steps // every
    )  # the scores of samples too: of the start, and every so many steps
    return held.found


def test_a_short_run_holds_on_to_nothing(tiny_llava_dir: Path, tmp_path: Path) -> None:
    _, second, third = soak(tiny_llava_dir, tmp_path, 24, 8)
    for what in ("tensors", "tensor bytes", "open files"):
        assert third[what] == second[what]


@pytest.mark.slow
def test_two_thousand_steps_hold_on_to_nothing(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """What does grow is the log: an entry for each step and table of samples, here and in each trainer_state.json."""
    found = soak(tiny_llava_dir, tmp_path, 2000, 100)
    for held in found:
        print(held)
    warm, end = found[3], found[-1]
    for what in ("tensors", "tensor bytes", "open files"):
        assert end[what] == warm[what]
    assert end["MiB"] - warm["MiB"] < 40
    state = tmp_path / "run" / "checkpoint-2000" / "trainer_state.json"
    print(f"trainer_state.json: {state.stat().st_size / 2000:.0f} bytes a step")
