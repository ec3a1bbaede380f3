"""`trl-llava push`: a run or checkpoint that lies in a folder, pushed after the run.

    trl-llava push runs/llava-1.5-7b-hf/reward [--hub_model_id org/name]
    trl-llava push runs/llava-1.5-7b-hf/reward/checkpoint-400

What is pushed is what the run itself would have pushed with `--push_to_hub`: of a folder of a run all checkpoints
that are later than the last one on the Hub (none with `hub_strategy: end`), each with its tag, and then, if the run
is finished, its end.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import HubStrategy

from trl_llava.configs.recipe import Recipe, RecipeLoader
from trl_llava.errors import InputError
from trl_llava.hub.lookup import UNREACHABLE, first_line
from trl_llava.publish.model_card import CardFacts, write_model_card
from trl_llava.publish.push import HubPush
from trl_llava.publish.repository import HubError, Repository
from trl_llava.publish.shareable import FACTS_FILE
from trl_llava.run.checkpoint_folders import checkpoints, step_of
from trl_llava.run.manifest import check_manifest
from trl_llava.run.output_dir import FINISHED_FILE, RECIPE_FILE


def main(argv: Sequence[str]) -> int:
    """Runs the command with the words behind `trl-llava push`; returns its exit status."""
    args = make_parser().parse_args(argv)
    folder = Path(args.folder).absolute()
    one_checkpoint = step_of(folder) >= 0
    run = folder.parent if one_checkpoint else folder
    if not (run / FACTS_FILE).is_file():
        raise InputError(f"{args.folder} is neither the folder of a run nor one of its checkpoints: no {FACTS_FILE}")
    recipe = run / RECIPE_FILE  # a run from Python has none
    values = yaml.load(recipe.read_text(encoding="utf-8"), Loader=RecipeLoader) if recipe.is_file() else {}
    strategy = HubStrategy(values.get("hub_strategy", "every_save"))
    finished = not one_checkpoint and (run / FINISHED_FILE).is_file()
    given = {key: value for key, value in vars(args).items() if value is not None}
    hub = {**values, **given}
    repository = Repository(
        hub.get("hub_model_id") or run.name,
        hub.get("hub_revision"),
        hub.get("hub_private_repo"),
        Recipe(values, {}) if values else None,
        # Without a recipe there is nothing that tells one run from another.
        onto_existing=hub.get("hub_onto_existing", False) or not values,
    )
    try:
        repository.verify()
        found = [folder] if one_checkpoint else _to_push(run, strategy, finished, repository)
    except UNREACHABLE as error:
        raise HubError(f"the Hub cannot be reached ({first_line(error)}): try again later") from error
    if not found and not finished:
        print(f"{repository.name} has the last checkpoint of {args.folder} already.")
        return 0
    for checkpoint in found:
        check_manifest(checkpoint)
    push = HubPush(repository, run, strategy, keep_all=True)
    for checkpoint in found:
        _write_card(run, checkpoint, repository.name)
        push.checkpoint(checkpoint, step_of(checkpoint))
    if finished:
        _write_card(run, run, repository.name)
    url = push.end() if finished else push.finish()
    print(f"Pushed {', '.join([*(checkpoint.name for checkpoint in found), *['the end'] * finished])}: {url}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="trl-llava push", description="Push a run that lies in a folder.")
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--hub_model_id", help="where to; by default as the recipe says, or the folder's name")
    parser.add_argument("--hub_revision", help="branch")
    yes_or_no: dict[str, Any] = {"nargs": "?", "const": True, "type": string_to_bool}  # as in recipes
    parser.add_argument("--hub_private_repo", **yes_or_no, help="make a new repository private")
    parser.add_argument("--hub_onto_existing", **yes_or_no, help="also onto a repository that holds another run")
    return parser


def _to_push(run: Path, strategy: HubStrategy, finished: bool, repository: Repository) -> list[Path]:
    found = checkpoints(run)
    if not found and not finished:
        raise InputError(f"{run} holds no checkpoint-* and no finished run yet: there is nothing to push")
    if strategy is HubStrategy.END:
        return [] if finished else found[-1:]
    tags = [step_of(Path(tag.name)) for tag in repository.api.list_repo_refs(repository.name).tags]
    return [checkpoint for checkpoint in found if step_of(checkpoint) > max(tags, default=-1)]


def _write_card(run: Path, of: Path, name: str) -> None:
    """The card as it was at a checkpoint, or at the end."""
    state = json.loads((of / FINISHED_FILE).read_text(encoding="utf-8"))
    write_model_card(run, CardFacts.load(run), state["log_history"], name)
