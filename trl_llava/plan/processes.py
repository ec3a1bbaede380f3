"""How a launch would share a run out, read from its `accelerate` configuration."""

import json
from pathlib import Path
from typing import Any

import yaml

from trl_llava.plan.memory_model import Processes
from trl_llava.processes.launch_config import find_accelerate_config
from trl_llava.recipe_values import RecipeError


def find_processes(name: str | None, count: int | None) -> Processes:
    """How a launch would share a run out.

    Args:
        name: `--accelerate_config`: a file, or a name in accelerate_configs/.
        count: `--num_processes`.

    Returns:
        Number of processes, and what ZeRO divides among them (FSDP divides all).

    Raises:
        RecipeError: If the configuration cannot be read, or nothing says how many processes there are.
    """
    if name is None:
        return Processes(count or 1)
    path = find_accelerate_config(name)
    config = _read(path, name)
    given = config.get("num_processes", 1)
    if count is None and (not isinstance(given, int) or given < 1):
        raise RecipeError(f"{path} leaves the number of processes open: give --num_processes, one for each GPU.")
    kind = config.get("distributed_type")
    stage = 3 if kind == "FSDP" else _zero_stage(config, path) if kind == "DEEPSPEED" else 0
    return Processes(count or int(given), stage)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"--accelerate_config {name}: cannot read {path}: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, dict):
        raise RecipeError(f"--accelerate_config {name}: {path} is no configuration that `accelerate config` writes.")
    return config


def _zero_stage(config: dict[str, Any], path: Path) -> int:
    """The ZeRO stage of a DeepSpeed configuration, which may be a file of its own."""
    settings = config.get("deepspeed_config") or {}
    own = settings.get("deepspeed_config_file")
    if own is None:
        return int(settings.get("zero_stage", 0))
    try:
        return int(json.loads(Path(own).read_text(encoding="utf-8"))["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path}: deepspeed_config_file {own} says no ZeRO stage (zero_optimization.stage): {error!r}."
        ) from error
