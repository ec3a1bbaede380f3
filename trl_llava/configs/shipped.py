"""The recipes and launch configurations that come with the package, found by name from any directory.

In a checkout `trl_llava/recipes` and `trl_llava/accelerate_configs` are links to the folders beside the package.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

FOLDERS = ("recipes", "accelerate_configs")


def shipped_folder(name: str) -> Path:
    """One of `FOLDERS`, wherever the package lies."""
    return Path(__file__).parents[1] / name


def find_shipped(name: str) -> Path:
    """A file of this name, seen from here; where there is none, one of `recipes/...` that came with the package."""
    path = Path(name).expanduser()
    if not path.exists() and path.parts[:1] and path.parts[0] in FOLDERS and ".." not in path.parts:
        shipped = shipped_folder(path.parts[0]).joinpath(*path.parts[1:])
        return shipped if shipped.is_file() else path
    return path


def recipe_path(words: Sequence[str]) -> str | None:
    """The file that a command line names with `--config`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    path = parser.parse_known_args(list(words))[0].config
    return None if path is None else str(find_shipped(path))
