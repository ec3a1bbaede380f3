"""What `-h` of a stage shows: the keys that recipes use; there are hundreds more."""

import argparse
import copy

from trl_llava.configs.recipe import RecipeParser, read_recipe
from trl_llava.configs.shipped import shipped_folder

OF_EVERY_RUN = (
    *("model_name_or_path", "dataset_name", "image_folder", "on_bad_row", "output_dir", "resume_from_checkpoint"),
    *("max_steps", "seed", "use_cpu", "load_in_4bit", "gradient_checkpointing", "save_total_limit", "report_to"),
    *("push_to_hub", "hub_model_id"),
)


def short_help(parser: RecipeParser) -> str:
    """The parser's help with those keys alone that the shipped recipes of its stage have, or that any run may need."""
    keys = set(OF_EVERY_RUN)
    for path in shipped_folder("recipes").glob(f"*/{parser.stage}*.yaml"):
        keys |= set(read_recipe(str(path)))
    shown = copy.copy(parser)
    shown._action_groups = [copy.copy(group) for group in parser._action_groups]
    for group in shown._action_groups:
        group._group_actions = [
            _plain(action)
            for action in group._group_actions
            if (action.dest in keys and not action.option_strings[0].startswith("--no_")) or action.dest == "config"
        ]
    more = len(parser.field_names) - len(keys & parser.field_names)
    return f"{shown.format_help()}\n{more} more keys: --help-all\n"


def _plain(action: argparse.Action) -> argparse.Action:
    """An option under one of its names, with a short word for its value."""
    shown = copy.copy(action)
    shown.option_strings = action.option_strings[:1]
    shown.metavar = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE")
    return shown
