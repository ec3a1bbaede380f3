"""The launch configurations of a checkout, by name."""

import argparse
from pathlib import Path

import yaml

import trl_llava
from trl_llava.errors import RecipeError


def find_accelerate_config(name: str) -> Path:
    """The file of a launch configuration.

    Args:
        name: A file, or a name in accelerate_configs/ of a checkout.

    Returns:
        The file.

    Raises:
        RecipeError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = config_folder()
    found = folder / f"{name}.yaml"
    if found.is_file():
        return found
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if not known:
        raise RecipeError(
            f"--accelerate_config {name}: no such file. The names of accelerate_configs/ work in a checkout of "
            "trl-llava only; give a file (`accelerate config` writes one)."
        )
    raise RecipeError(f"--accelerate_config {name}: neither a file nor one of {', '.join(known)}.")


def start_as_many_as_asked(options: argparse.Namespace) -> None:
    """Makes the launcher start all processes: by itself it starts one, silently, where it is told no way to several.

    Args:
        options: Those of `accelerate launch`; `multi_gpu` is set, which is its name for torchrun, on CPUs too.

    Raises:
        RecipeError: If the configuration is one for a single process.
    """
    from accelerate.commands.config.config_args import default_config_file

    ways = ("multi_gpu", "cpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    if (options.num_processes or 1) < 2 or any(getattr(options, way) for way in ways):
        return
    config = Path(options.config_file or default_config_file)
    if not config.is_file():
        options.multi_gpu = True
    elif yaml.safe_load(config.read_text(encoding="utf-8")).get("distributed_type") in ("NO", False, None):
        raise RecipeError(
            f"--num_processes {options.num_processes}: {config} is for one process (`distributed_type: NO`). Use "
            "another one, such as `--accelerate_config ddp`."
        )


def config_folder() -> Path:
    """Where a checkout has its launch configurations.

    Returns:
        The folder; it is not there in an installed package.
    """
    return Path(trl_llava.__file__).parents[1] / "accelerate_configs"
