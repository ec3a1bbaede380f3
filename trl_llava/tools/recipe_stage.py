"""Which stage a recipe is for, where a command reads recipes of any."""

from collections.abc import Sequence

from trl_llava.configs.recipe import STAGES, read_recipe, stage_in_name, stages_with
from trl_llava.configs.shipped import recipe_path
from trl_llava.errors import RecipeError


def find_stage(words: Sequence[str]) -> str:
    """Which stage a recipe is for: the first word of the file's name, or the only stage that has all of its fields."""
    path = recipe_path(words)
    recipe = read_recipe(path) if path else {}
    if (named := stage_in_name(path or "")) is not None:
        return named
    overridden = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    fitting = stages_with({*recipe, *overridden} - {"config"})
    if len(fitting) != 1:
        known = f"fits {' and '.join(fitting)}" if fitting else f"fits none of {', '.join(STAGES)}"
        source = path or "without --config, the command line"
        raise RecipeError(f"{source} {known}: say with --stage which one it is for.")
    return fitting[0]
