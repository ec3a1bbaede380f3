"""How a launch would share a run out, read from its `accelerate` configuration."""

import json
from pathlib import Path
from typing import Any

import yaml

from trl_llava.errors import RecipeError
from trl_llava.run.launch import find_accelerate_config
from trl_llava.tools.plan.sharing import Processes, ZeroSizes


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
    if kind == "FSDP":
        return Processes(count or int(given), 3, fsdp=True)
    if kind != "DEEPSPEED":
        return Processes(count or int(given))
    zero = _zero(config, path)
    return Processes(count or int(given), int(zero["stage"]), sizes=_sizes(zero))


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"--accelerate_config {name}: cannot read {path}: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, dict):
        raise RecipeError(f"--accelerate_config {name}: {path} is no configuration that `accelerate config` writes.")
    return config


def _zero(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`zero_optimization` of a DeepSpeed configuration, which may be a file of its own."""
    settings = config.get("deepspeed_config") or {}
    own = settings.get("deepspeed_config_file")
    if own is None:
        zero = {"stage": settings.get("zero_stage", 2)}  # accelerate's default
        devices = [settings.get(f"offload_{what}_device") for what in ("optimizer", "param")]
    else:
        try:
            zero = json.loads(Path(own).read_text(encoding="utf-8"))["zero_optimization"]
            int(zero["stage"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{path}: deepspeed_config_file {own} says no ZeRO stage (zero_optimization.stage): {error!r}."
            ) from error
        devices = [(zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")]
    if any(device not in (None, "none") for device in devices):
        raise RecipeError(f"{own or path} offloads to another memory, which a plan does not know: plan without it.")
    return zero


def _sizes(zero: dict[str, Any]) -> ZeroSizes:
    """What it says of sizes; "auto" is known with the model's width."""

    def size(name: str, default: int | None) -> int | None:
        said = zero.get(name, default)
        return None if said in (None, "auto") else int(said)

    usual = ZeroSizes()
    return ZeroSizes(
        reduce_bucket=size("reduce_bucket_size", usual.reduce_bucket),
        persistent=size("stage3_param_persistence_threshold", usual.persistent),
        live=size("stage3_max_live_parameters", usual.live) or usual.live,
        overlap=bool(zero.get("overlap_comm")),
    )
