"""What each process of launched runs holds: written as `memory_RANK.json` into their `output_dir`.

accelerate launch ... tests/launched_memory.py PLAN.json

The plan is a list of `[stage, [word, ...]]`. Counted is storage, as `MemoryTrace` counts it: at rest after training,
and the peak of the passes and of the optimizer's steps.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from launched_stages import without_operations_of_inference
from measured import logits_folded_in_place
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trl_llava.ppo_trainer import LlavaPPOTrainer
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.run.console import run_as_program
from trl_llava.sft_trainer import LlavaSFTTrainer
from trl_llava.tools.plan.memory_trace import MemoryTrace

TRAINERS = {"sft": LlavaSFTTrainer, "reward": LlavaRewardTrainer, "ppo": LlavaPPOTrainer}


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Storages with their bytes, each once; what is no tensor has none."""
    found = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return {storage._cdata: storage.nbytes() for storage in found}


def weights_of(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Weights and buffers, and ZeRO-3's shares of weights."""
    shares = [getattr(parameter, "ds_tensor", None) for parameter in model.parameters()]
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *shares) if tensor is not None}


def states_of(optimizer: Any) -> list[Any]:
    """What an optimizer keeps, DeepSpeed's own copies of the weights included."""
    copies: list[Any] = []
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's around it
        optimizer = optimizer.optimizer
        copies += getattr(optimizer, "fp32_partitioned_groups_flat", [])  # which ZeRO-3 hands over for a step only
    copies += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [*copies, *(value for state in optimizer.state.values() for value in state.values())]


def noting_lengths(collator: Callable[..., Any], lengths: list[int]) -> Callable[..., Any]:
    """A collator that notes how long its rows are."""

    def noting(rows: list[Any]) -> Any:
        batch = collator(rows)
        lengths.append(batch["input_ids"].shape[1])
        return batch

    return noting


def follow_steps(trace: MemoryTrace, peaks: dict[str, int]) -> None:
    """Tell the peak of the optimizer's steps from that of all before."""

    def begin(*_: Any) -> None:
        if "step" in peaks:  # before the first one, all is set up
            peaks["passes"] = max(peaks.get("passes", 0), trace.peak)
        trace.restart()

    def end(*_: Any) -> None:
        peaks["step"] = max(peaks.get("step", 0), trace.peak)
        trace.restart()

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        register_optimizer_step_pre_hook(begin)
        register_optimizer_step_post_hook(end)
        return
    from deepspeed.runtime.engine import DeepSpeedEngine

    step = DeepSpeedEngine.step

    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_gradient_accumulation_boundary():
            return step(self, *args, **kwargs)
        begin()
        step(self, *args, **kwargs)
        end()

    DeepSpeedEngine.step = followed


def followed(train: Callable[..., Any]) -> Callable[..., Any]:
    """`train`, which writes down what it holds."""

    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        peaks: dict[str, int] = {}
        lengths: list[int] = []
        with logits_folded_in_place(), MemoryTrace() as trace:
            trace.hold(weights_of(self.model).values(), "weights")
            follow_steps(trace, peaks)
            self.data_collator = noting_lengths(self.data_collator, lengths)
            result = train(self, *args, **kwargs)
        weights = storages(weights_of(self.model).values())
        states = storages(states_of(self.optimizer))
        found = {
            **peaks,
            "length": max(lengths),
            "weights": sum(weights.values()),
            "optimizer": sum(size for key, size in states.items() if key not in weights),
        }
        Path(self.args.output_dir, f"memory_{os.environ['RANK']}.json").write_text(json.dumps(found))
        return result

    return trained


def main(plan: str) -> None:
    without_operations_of_inference()
    for stage, words in json.loads(Path(plan).read_text()):
        trainer: Any = TRAINERS[stage]
        trainer.train = followed(trainer.train)
        importlib.import_module(f"trl_llava.train_{stage}").main(words)


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1]))
