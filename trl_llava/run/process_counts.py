"""Which checkpoints this number of processes can resume from.

Which rows a step takes, and in PPO the noise of every draw, are functions of seed and step, not of processes; so under
DDP and FSDP a run may resume with another number of them, as long as a step takes as many rows as before. What
DeepSpeed has split into one part for each process is read by as many again.
"""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from trl_llava.errors import InputError

_WHOLE, _FSDP = "without DeepSpeed or FSDP", "under FSDP"


class ProcessCountError(InputError):
    """A checkpoint that this number of processes cannot resume from."""

    exit_status = 2


def check_processes(checkpoint: Path, args: TrainingArguments, recipe: dict[str, Any]) -> None:
    """Refuse a checkpoint that these processes would read wrongly or not at all; `recipe` is of the run it is of."""
    processes = PartialState().num_processes  # PPO's `world_size` is not set yet
    written, now = _written_under(checkpoint), _running_under(processes)
    if written != now:
        raise ProcessCountError(
            f"checkpoint {checkpoint} was written {written}, and this run is {now}: each keeps the optimizer in "
            f"parts or files of its own. Resume {written}, or start a new run with its weights"
        )
    before = _rows_per_step(checkpoint, recipe)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if before is not None and before != rows:
        raise ProcessCountError(
            f"a step of checkpoint {checkpoint} took {before} rows, and one of this run takes {rows} "
            f"(`per_device_train_batch_size` {args.per_device_train_batch_size} * `gradient_accumulation_steps` "
            f"{args.gradient_accumulation_steps} * {processes} processes), so it would skip or repeat rows. Set "
            f"them so that the product is {before}"
        )


def _running_under(processes: int) -> str:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"under DeepSpeed with {processes} processes"
    return _FSDP if os.environ.get("ACCELERATE_USE_FSDP") == "true" else _WHOLE


def _written_under(checkpoint: Path) -> str:
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return _FSDP
    tag = checkpoint / "latest"
    if not tag.is_file():
        return _WHOLE
    parts = list((checkpoint / tag.read_text().strip()).glob("*zero_pp_rank_*_optim_states.pt"))
    return f"under DeepSpeed with {len(parts)} processes"


def _rows_per_step(checkpoint: Path, recipe: dict[str, Any]) -> int | None:
    """How many rows a step took on all processes; `None` if nothing says so."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state.get("global_step") and state.get("episode"):  # PPO counts its completions
        return state["episode"] // state["global_step"]
    rows, accumulation = recipe.get("per_device_train_batch_size"), recipe.get("gradient_accumulation_steps")
    if not isinstance(rows, int) or not isinstance(accumulation, int):
        return None
    return rows * accumulation * (len(list(checkpoint.glob("rng_state_*.pth"))) or 1)
