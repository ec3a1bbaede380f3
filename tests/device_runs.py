"""Runs of the stages on a toy of LLaVA-1.5, on the CPU or on a GPU: what the tests of GPUs do, on either.

The toy's attention heads are 16 wide, the least that flex attention takes.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import stage_runs
import torch
import toy_models
from accelerate.state import AcceleratorState
from launched_memory import TRAINERS
from measured import longest, planned
from tiny_models import image
from transformers import PreTrainedModel

from benchmarks.rows import command_line, make_rows
from benchmarks.workload import Size, make_base, make_reward
from trl_llava.configs.recipe import make_parser
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.load import load_policy, load_processor, load_sequence_classifier
from trl_llava.tools.plan.memory_trace import MemoryTrace

BASES: dict[str, list[str]] = {
    "fp32": ["--dtype", "float32", "--bf16", "false"],
    "bf16": ["--dtype", "bfloat16", "--bf16", "true"],
    "nf4": ["--dtype", "bfloat16", "--bf16", "true", "--load_in_4bit", "true"],
    "int8": ["--dtype", "bfloat16", "--bf16", "true", "--load_in_8bit", "true"],
}


def words_on(device: str, base: str) -> list[str]:
    """The words of a recipe that say where it computes and in what."""
    return ["--use_cpu", str(device == "cpu"), *BASES[base]]


def run(stage: str, words: list[str]) -> Any:
    """Run a stage in this process, which forgets the precision of the run before; returns the trainer."""
    AcceleratorState._reset_state(True)
    try:
        return importlib.import_module(f"trl_llava.train_{stage}").main(words)
    finally:
        AcceleratorState._reset_state(True)


class Runs:
    """A folder with the toy, rows, and an adapter and a reward model that PPO starts from."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.base = toy_models.llava_1_5(folder / "base", "7b", 56)  # 16 patches
        stage_runs.write_rows(folder)
        for stage in ("sft", "reward"):
            words = stage_runs.run_words(folder, self.base, folder / "start", stage, 1, "--max_steps", "1")
            run(stage, [*words, *words_on(device, "fp32")])

    def words(self, stage: str, out: Path, base: str, *more: str) -> list[str]:
        """The words of a run of three steps with a checkpoint after each; PPO's run has one micro-batch a step."""
        words = stage_runs.run_words(self.folder, self.base, out, stage, 1)
        return [*words, *words_on(self.device, base), *more]

    def run(self, stage: str, out: Path, base: str, *more: str) -> Any:
        """Run a stage; returns the trainer."""
        return run(stage, self.words(stage, out, base, *more))

    def two_steps(self, stage: str, out: Path, base: str, *more: str) -> Any:
        """Run a stage for two steps, and see that they trained: finite numbers, and weights that moved."""
        steps = ["--total_episodes", "8"] if stage == "ppo" else ["--max_steps", "2", "--eval_strategy", "no"]
        trainer = self.run(stage, out, base, *steps, "--save_strategy", "no", *more)
        assert trainer.state.global_step == 2
        assert next(trainer.model.parameters()).device.type == self.device
        moved = [p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in name]
        assert moved and all(bool(p.isfinite().all()) for p in moved) and any(bool(p.any()) for p in moved)
        return trainer


def outputs(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """Logits of the policy and scores of a score-head model, on the CPU, of rows with and without padding."""
    args = LlavaModelConfig(model_name_or_path=str(folder), dtype="float32")
    processor = load_processor(str(folder))
    texts = ["<image> What is it?", "<image> What is in the picture? There is a red square."]
    batch = processor(text=texts, images=[image("red"), image("blue")], return_tensors="pt", padding=True).to(device)
    keep = batch["attention_mask"].bool().cpu()

    def compute(model: PreTrainedModel) -> Any:
        with torch.no_grad():
            return model.to(device).eval()(**batch).logits.cpu()

    head = load_sequence_classifier(str(folder), args, seed=3)
    return {"policy": compute(load_policy(args))[keep], "score": compute(head)}


class Held:
    """Bytes that training holds at its peak, with its models, and without what libraries take for themselves."""

    def __init__(self, device: str) -> None:
        self.device, self.libraries, self.peak = device, 0, 0
        if device == "cuda":
            some = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
            some @ some  # cuBLAS takes its workspace at the first product, and keeps it
            del some
            self.libraries = torch.cuda.memory_allocated()

    def during(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """A trainer's `train`, which measures."""

        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                result = train(trainer, *args, **kwargs)
                self.peak = torch.cuda.max_memory_allocated() - self.libraries
                return result
            with MemoryTrace() as trace:
                trace.hold([*trainer.model.parameters(), *trainer.model.buffers()], "weights")
                result = train(trainer, *args, **kwargs)
            self.peak = trace.peak
            return result

        return measured


def planned_and_measured(stage: str, size: Size, rows: int, device: str, base: str, folder: Path) -> tuple[int, int]:
    """Bytes that the plan says of two steps of a stage, and bytes that they held."""
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    model = make_base(size, folder / "base", dtype=dtype)
    reward = make_reward(model, size, folder / "reward", dtype=dtype)
    columns = {"sft": ["completion"], "reward": ["chosen", "rejected"], "ppo": []}[stage]
    # Of mixed length, so that there are masks, as the plan says.
    make_rows(size, folder / "rows", 2 * rows, dict.fromkeys(columns, (56, 64)))
    values: dict[str, Any] = {
        "model_name_or_path": model,
        "use_peft": True,
        "lora_r": size.rank,
        "dataset_name": folder / "rows" / "rows.jsonl",
        "image_folder": folder / "rows",
        "output_dir": folder / "out",
        "per_device_train_batch_size": rows,
        "gradient_checkpointing": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if stage == "ppo":
        values |= {"reward_model_path": reward, "response_length": 64, "total_episodes": 2 * rows}
        values |= {"stop_token": None, "num_sample_generations": 0, "local_rollout_forward_batch_size": rows}
    else:
        values |= {"max_steps": 2, "max_length": None}
    values |= {"share_prefix": False, "with_captions": False} if stage == "reward" else {}
    words = [*command_line(values), *words_on(device, base)]
    held = Held(device)
    with mock.patch.object(TRAINERS[stage], "train", held.during(TRAINERS[stage].train)):
        trainer = run(stage, words)
    _, args, model_args, *_ = make_parser(stage).parse(words)
    length = longest(trainer)
    judged = {"judged_length": length + 64, "limit": 80 * 10**9} if stage == "ppo" else {}
    return planned(stage, args, model_args, length, **judged), held.peak
