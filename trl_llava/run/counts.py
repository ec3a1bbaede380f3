"""A checkpoint and the number of processes that go on from it: what fits, and what is refused before anything loads.

Which rows a step takes, and in PPO the noise of every draw, are functions of seed and step, not of processes; so under
DDP and FSDP a run goes on with another number of them, as long as a step takes as many rows as before. What DeepSpeed
has cut into one part for each process is read by as many again.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import TrainingArguments

from trl_llava.configs.recipe_values import RecipeLoader
from trl_llava.errors import InputError

_WHOLE, _FSDP = "without DeepSpeed or FSDP", "under FSDP"


class ProcessCountError(InputError):
    """A checkpoint that this number of processes cannot go on from."""

    exit_status = 2


def check_processes(checkpoint: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint that these processes would read wrongly or not at all.

    Args:
        checkpoint: a checkpoint folder, with the recipe of its run beside it where that is known.
        args: the arguments of the run that goes on.

    Raises:
        ProcessCountError: if DeepSpeed wrote it for another number of processes, or only one of the two runs is under
            DeepSpeed or FSDP, or a step would take another number of rows.
    """
    processes = PartialState().num_processes  # PPO's `world_size` is not set yet
    written, now = _way_written(checkpoint), _way(processes)
    if written != now:
        raise ProcessCountError(
            f"checkpoint {checkpoint} was written {written}, and this run is {now}: each way keeps the optimizer in "
            f"parts or files of its own. Resume {written}, or start a new run with its weights"
        )
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    before = _rows_per_step(checkpoint, state)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if before is not None and before != rows:
        raise ProcessCountError(
            f"a step of checkpoint {checkpoint} took {before} rows, and one of this run takes {rows} "
            f"(`per_device_train_batch_size` {args.per_device_train_batch_size} * `gradient_accumulation_steps` "
            f"{args.gradient_accumulation_steps} * {processes} processes), so it would skip or repeat rows. Set "
            f"them so that the product is {before}"
        )


def _way(processes: int) -> str:
    """How this run shares its optimizer out, as `_way_written` says it of a checkpoint."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return _deepspeed(processes)
    return _FSDP if os.environ.get("ACCELERATE_USE_FSDP") == "true" else _WHOLE


def _way_written(checkpoint: Path) -> str:
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return _FSDP
    tag = checkpoint / "latest"
    if not tag.is_file():
        return _WHOLE
    parts = (checkpoint / tag.read_text().strip()).glob("*zero_pp_rank_*_optim_states.pt")
    return _deepspeed(len(list(parts)))


def _deepspeed(processes: int) -> str:
    return f"under DeepSpeed with {processes} processes"


def _rows_per_step(checkpoint: Path, state: dict[str, Any]) -> int | None:
    """How many rows a step took on all processes; `None` if nothing says so."""
    steps = state.get("global_step", 0)
    if steps and state.get("episode"):  # PPO counts its answers
        return state["episode"] // steps
    processes = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    recipe = checkpoint.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    values = yaml.load(recipe.read_text(encoding="utf-8"), Loader=RecipeLoader) or {}
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if not all(isinstance(values.get(name), int) for name in names):
        return None
    return values[names[0]] * values[names[1]] * processes
