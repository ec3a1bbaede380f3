"""The launch configurations of a checkout, by name."""

from pathlib import Path

import trl_llava
from trl_llava.recipe_values import RecipeError


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


def config_folder() -> Path:
    """Where a checkout has its launch configurations.

    Returns:
        The folder; it is not there in an installed package.
    """
    return Path(trl_llava.__file__).parents[1] / "accelerate_configs"
