"""How a launch shares a run out among processes, read from its `accelerate` configuration."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from trl_llava.errors import RecipeError
from trl_llava.run.launch import find_accelerate_config


@dataclass(frozen=True)
class ZeroSizes:
    """DeepSpeed's `zero_optimization`, as far as it decides memory; numbers of weights, with DeepSpeed's defaults."""

    reduce_bucket: int | None = (
        500_000_000  # reduce_bucket_size: gradients averaged at once; None ("auto"): width ** 2
    )
    persistent: int | None = (
        100_000  # stage3_param_persistence_threshold: weights up to it are whole; None: 10 * width
    )
    live: int = 1_000_000_000  # stage3_max_live_parameters, gathered at once
    overlap: bool = False  # overlap_comm: a second bucket for ZeRO-1 and -2


@dataclass(frozen=True)
class Processes:
    """How a run is shared out among processes, one GPU each.

    ZeRO shares out optimizer states at stage 1, gradients too at 2, weights too at 3 as FSDP does; DDP nothing.
    """

    count: int = 1
    zero_stage: int = 0
    fsdp: bool = False  # without DeepSpeed's buffers
    sizes: ZeroSizes = field(default_factory=ZeroSizes)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.zero_stage > 0 and not self.fsdp

    def for_width(self, width: int) -> "Processes":
        """A copy with what "auto" means for a model of this hidden size."""
        sizes = self.sizes
        bucket = width * width if sizes.reduce_bucket is None else sizes.reduce_bucket
        persistent = 10 * width if sizes.persistent is None else sizes.persistent
        return replace(self, sizes=replace(sizes, reduce_bucket=bucket, persistent=persistent))

    def share(self, count: int) -> int:
        """A process's part of some numbers or bytes, rounded up."""
        return -(-count // self.count)


def find_processes(name: str | None, count: int | None) -> Processes:
    """Number of processes, and what is divided among them; `name` is `--accelerate_config`, `count` `--num_processes`.

    A configuration that cannot be read, or that leaves the number open, is a `RecipeError`.
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
    """The sizes that a configuration sets; "auto" is known with the model's width."""

    def size(name: str, default: int | None) -> int | None:
        given = zero.get(name, default)
        return None if given in (None, "auto") else int(given)

    usual = ZeroSizes()
    return ZeroSizes(
        reduce_bucket=size("reduce_bucket_size", usual.reduce_bucket),
        persistent=size("stage3_param_persistence_threshold", usual.persistent),
        live=size("stage3_max_live_parameters", usual.live) or usual.live,
        overlap=bool(zero.get("overlap_comm")),
    )
